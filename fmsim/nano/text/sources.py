"""Which Debian packages nano's text comes from, under which licences, and which of their files.

Of the documents of the later ones, dictionaries, manuals and source code, two in five are held out,
so that ten million tokens and more serve validation, tests and traces, none of which any nano has
read.
"""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT_SHARE = 0.032  # of the documents, beside `corpus.HELD_OUT_NAMES`
NEW_SHARE = 0.4  # of the documents of the later sources


@dataclass(frozen=True)
class Source:
    """A package, the files of it that are read, and those that are not (indexes, copies of other
    pages, translations).
    """

    package: str
    licence: str
    files: str
    skip: str = r"(?!)"
    held_out_share: float = HELD_OUT_SHARE
    code: bool = False  # English is asked of prose alone


SOURCES = (
    Source("anarchism", "GPL-2 or GFDL-1.1", r"/html/[^/]*\.html$", r"changelog"),
    Source(
        "debian-handbook",
        "CC-BY-SA-3.0 or GPL-2.0+",
        r"/html/en-US/[^/]*\.html$",
        r"/index\.html$|/ix01\.html$",
    ),
    Source(
        "debian-policy",
        "GPL-2+",
        r"/policy\.html/.*\.html$|/fhs/fhs-3\.0\.html$",
        r"genindex|search\.html",
    ),
    Source(
        "developers-reference",
        "GPL-2+",
        r"/developers-reference/[^/]*\.html$",
        r"developers-reference\.html$|genindex|search\.html",
    ),
    Source("dict-gcide", "GPL-3+", r"/gcide\.dict\.dz$"),
    Source(
        "linux-doc-6.1",
        "GPL-2",
        r"/html/.*\.html$",
        r"/translations/|genindex|search\.html|/index\.html$|/maintainers\.html$",
    ),
    Source("perl-doc", "Artistic or GPL-1+", r"\.pod$", r"/perltoc\.pod$|/perluniprops\.pod$"),
    Source("postgresql-doc-15", "PostgreSQL", r"/html/[^/]*\.html$", r"bookindex|legalnotice"),
    Source(
        "python3.11-doc",
        "PSF-2.0",
        r"/html/.*\.html$",
        r"genindex|contents\.html$|search\.html|modindex|/index\.html$",
    ),
    Source("r-cran-janeaustenr", "MIT (public-domain novels)", r"/data/Rdata\.rdb$"),
    Source(
        "sqlite3-doc",
        "public-domain",
        r"/sqlite3?/.*\.html$",
        r"requirements\.html|crossref|matrix|keyword_index|sitemap|doclist",
    ),
    Source("vim-doc", "Vim or OPL-1.0", r"/html/[^/]*\.html$", r"/tags\.html$|/index\.html$"),
    # What the first nano had not read:
    Source(
        "cppreference-doc-en-html", "CC-BY-SA-3.0 or GFDL-1.3", r"/en/cpp/.*\.html$",
        r"/(Talk|User|Special)", NEW_SHARE,
    ),
    Source("dict-foldoc", "GFDL-1.1", r"/foldoc\.dict\.dz$", held_out_share=NEW_SHARE),
    Source("dict-jargon", "public-domain", r"/jargon\.dict\.dz$", held_out_share=NEW_SHARE),
    Source("dict-wn", "WordNet-3.0", r"/wn\.dict\.dz$", held_out_share=NEW_SHARE),
    Source("gimp-help-en", "GFDL-1.2", r"/help/.*\.html$", r"/index\.html$", NEW_SHARE),
    Source("git-doc", "GPL-2", r"/git-doc/.*\.html$", r"/index\.html$", NEW_SHARE),
    Source("libboost1.74-doc", "BSL-1.0", r"/doc/html/.*\.html$", r"/index\.html$", NEW_SHARE),
    Source("libreoffice-help-en-us", "MPL-2.0", r"/help/en-US/.*\.html$", held_out_share=NEW_SHARE),
    Source(
        "llvm-14-doc", "Apache-2.0 with LLVM exception", r"/html/.*\.html$",
        r"genindex|search\.html", NEW_SHARE,
    ),
    Source("nodejs-doc", "MIT", r"/api/[^/]*\.html$", r"/all\.html$|/index\.html$", NEW_SHARE),
    Source(
        "octave-doc", "GPL-3+", r"/octave\.html/.*\.html$",
        r"_index\.html$|/index\.", NEW_SHARE,
    ),
    Source(
        "python-django-doc", "BSD-3-Clause", r"/html/.*\.html$",
        r"genindex|search|modindex", NEW_SHARE,
    ),
    Source(
        "rust-doc", "MIT or Apache-2.0",
        r"/html/(book|reference|nomicon|rust-by-example)/.*\.html$",
        r"/print\.html$|/index\.html$|/editions?/", NEW_SHARE,
    ),
    Source(
        "golang-1.19-src", "BSD-3-Clause", r"/go-1\.19/src/.*\.go$",
        r"_test\.go$|/testdata/|/vendor/|/z[^/]*\.go$|tables\.go$|/rewrite[^/]*\.go$|opGen\.go$",
        NEW_SHARE, code=True,
    ),
    Source(
        "libpython3.11-stdlib", "PSF-2.0", r"/python3\.11/.*\.py$", r"/encodings/|pydoc_data",
        NEW_SHARE, code=True,
    ),
)  # fmt: skip

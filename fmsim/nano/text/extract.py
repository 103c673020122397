"""Plain text out of the formats that Debian's documentation packages hold: HTML, POD, dictd files,
R data.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

from fmsim.errors import FmsimError

BLOCKS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "br",
        "caption",
        "dd",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "ol",
        "option",
        "p",
        "pre",
        "section",
        "table",
        "tbody",
        "thead",
        "title",
        "tr",
        "ul",
    ]
)
PARAGRAPHS = frozenset(
    [
        "p",
        "pre",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "dl",
        "ul",
        "ol",
        "table",
        "blockquote",
        "section",
    ]
)
SKIPPED_TAGS = frozenset(
    ["script", "style", "head", "nav", "header", "footer", "button", "svg", "select"]
)
SKIPPED_MARKS = frozenset(
    [
        "sphinxsidebar",
        "related",
        "footer",
        "navheader",
        "navfooter",
        "docnav",
        "headerlink",
        "wy-nav-side",
        "wy-nav-top",
        "rst-footer-buttons",
        "toc",
        "toctree-wrapper",
        "navigation",
        "nosearch",
        "fancy_title",
        "genindextable",
    ]
)
VOID = frozenset(
    [
        "area",
        "base",
        "br",
        "col",
        "embed",
        "hr",
        "img",
        "input",
        "link",
        "meta",
        "source",
        "track",
        "wbr",
    ]
)


class _Reader(HTMLParser):
    """Text in reading order; blocks end lines, ``pre`` keeps its white space, navigation is left
    out.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped_tag, self._skip_depth, self._pre_depth = "", 0, 0

    def handle_starttag(self, tag, attributes):
        if self._skip_depth:
            self._skip_depth += tag == self._skipped_tag
            return
        marks = " ".join(v or "" for k, v in attributes if k in ("class", "role", "id")).split()
        if tag not in VOID and (tag in SKIPPED_TAGS or not SKIPPED_MARKS.isdisjoint(marks)):
            self._skipped_tag, self._skip_depth = tag, 1
            return
        self._pre_depth += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag):
        if self._skip_depth:
            self._skip_depth -= tag == self._skipped_tag
            return
        self._pre_depth = max(0, self._pre_depth - (tag == "pre"))
        self._break(tag)

    def handle_data(self, data):
        if not self._skip_depth:
            self.parts.append(data if self._pre_depth else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag in BLOCKS:
            self.parts.append("\n\n" if tag in PARAGRAPHS else "\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")


def html_text(page: str) -> str:
    """The readable text of an HTML page, without scripts, navigation and page furniture."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    return tidy("".join(reader.parts).replace("\u00b6", ""))


def pod_text(page: str) -> str:
    """The text of a Perl POD page: commands become lines, formatting codes (``C<x>``,
    ``L<name|target>``) their content.
    """
    lines = [
        line
        for line in page.splitlines()
        if not re.match(r"=(encoding|over|back|cut|pod|begin|end|for)\b", line)
    ]
    text = re.sub(r"(?m)^=(head\d|item)\s*", "", "\n".join(lines))
    text = re.sub(r"\b[BCFILS]<<+ (.*?) >>+", r"\1", text)  # doubled brackets may hold single ones
    text = re.sub(r"[XZ]<[^<>]*>", "", text)
    # brackets wait as control characters, lest they be taken for codes
    escapes = {"gt": "\1", "lt": "\2", "sol": "/", "verbar": "|"}
    text = re.sub(r"E<(gt|lt|sol|verbar)>", lambda found: escapes[found[1]], text)
    for _ in range(3):  # codes nest
        text = re.sub(r"\b[BCFILS]<([^<>|]*)(?:\|[^<>]*)?>", r"\1", text)
    text = text.replace("\1", ">").replace("\2", "<")
    return tidy(text)


def dictd_text(path: Path) -> str:
    """The whole text of a dictd dictionary (gzip with an index in its header), without its source
    marks.
    """
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    return tidy(
        re.sub(
            r"(?m)^\s*\[(1913 Webster|PJC|WordNet 1\.5|Webster 1913 Suppl\.|Century"
            r" Dict[^\]]*)\][^\n]*\n",
            "",
            text,
        )
    )


def r_strings(path: Path) -> list[list[str]]:
    """The character vectors of an R lazy-load database (``*.rdb``), in file order.

    The file is a run of chunks, each a big-endian length, then (unless zlib) a letter naming the
    compression, then an object in R's XDR serialisation (R Internals, section 1.8). Only plain
    character vectors are read.
    """
    data, place, vectors = path.read_bytes(), 0, []
    while place + 5 < len(data):
        kind = data[place + 4 : place + 5]
        start = place + (4 if kind == b"x" else 5)
        unpacker = {b"2": bz2.BZ2Decompressor, b"Z": lzma.LZMADecompressor}.get(
            kind, zlib.decompressobj
        )()
        try:
            chunk = unpacker.decompress(data[start:])
        except (OSError, lzma.LZMAError, zlib.error) as error:
            raise FmsimError(
                f"{path}: not an R lazy-load database (byte {place}: {error}); give the .rdb of an"
                " R data package"
            ) from error
        place = len(data) - len(unpacker.unused_data)
        vectors += _character_vector(chunk)
    return vectors


def _character_vector(chunk: bytes) -> list[list[str]]:
    """``[strings]`` if the serialised object is a character vector, else ``[]``."""
    header = 14  # "X\n" and three versions; from version 3 on, the native encoding follows
    if struct.unpack_from(">i", chunk, 2)[0] >= 3:
        header += 4 + struct.unpack_from(">i", chunk, 14)[0]
    flags, count = struct.unpack_from(">ii", chunk, header)
    if flags & 0xFF != 16:  # STRSXP
        return []
    place, strings = header + 8, []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", chunk, place)
        place += 8
        strings.append(chunk[place : place + max(0, length)].decode("utf-8", "replace"))
        place += max(0, length)
    return [strings]


def tidy(text: str) -> str:
    """No trailing blanks, no carriage returns, at most one empty line in a row, at most two
    newlines at the end.
    """
    text = text.replace("\r", "").replace("\u00a0", " ").replace("\t", "    ")
    text = re.sub(r"[ ]+\n", "\n", text)
    text = re.sub(r"(?m)^ (?=\S)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

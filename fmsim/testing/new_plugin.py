"""A new policy plug-in: a package that is a policy, its test and what installs it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fmsim.errors import FmsimError
from fmsim.policies import registry

POLICY = '''"""The policy {name}."""

from pydantic import Field

from fmsim import Policy, PolicyParams


class {cls}(Policy):
    """Keep the pages that were used last.

    Source: say here where the rule comes from, and what becomes of a miss.
    """

    name = "{name}"
    action = "hierarchical"  # misses are loaded from host memory
    evidence = "attention_history"  # what it goes by
    decision_scope = "layer"

    class Params(PolicyParams):
        weight_of_mass: float = Field(
            0.0, ge=0, description="steps that a page gains by all of a step's attention mass"
        )

    def reset(self, ctx):
        super().reset(ctx)
        self.last = ctx.table()  # float32 [G, P + 1], zeros

    def observe(self, step, obs):
        """Called after every step with the pages that it used."""
        self.ctx.put(self.last, obs.pages, step + 1 + self.params.weight_of_mass * obs.mass)

    def worth(self, step, pages):
        """How much each page is worth keeping; the highest stay."""
        return self.ctx.read(self.last, pages)
'''

TEST = '''"""fmsim's conformance kit, one test a rule."""

import pytest
from {module} import {cls}

from fmsim import policy_checks


@pytest.mark.parametrize("check", policy_checks({cls}), ids=str)
def test_{module}(check):
    check()
'''

PROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{package}"
version = "0.1.0"
dependencies = ["fmsim"]

[tool.setuptools]
py-modules = ["{module}"]

[project.entry-points."fmsim.policies"]
{name} = "{module}:{cls}"
"""

README = """# {package}

The policy `{name}` for fmsim, in `{module}.py`.

```
# fmsim's conformance kit
pytest
# without installing it
fmsim run 32k -p lru -p {module}.py:{cls}
# by its name
pip install -e .
fmsim run 32k -p lru -p {name}
```

fmsim's docs/tutorial/write-a-policy.md says how a policy is written.
docs/reference/policy.md lists what it may say and see.
"""


def write(name: str, parent: Path = Path()) -> Path:
    """Write the package of a policy called `name` into a new folder below `parent`; -> the folder.

    Raises FmsimError for a name that is none or is taken, and for a folder that exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise FmsimError(
            f"policy name {name!r}: write lower-case letters, digits and hyphens, such as my-policy"
        )
    if name in registry.names():
        raise FmsimError(f"policy name {name!r} is taken; choose another")
    names = {
        "name": name,
        "package": f"fmsim-{name}",
        "module": f"fmsim_{name.replace('-', '_')}",
        "cls": "".join(part.capitalize() for part in name.split("-")),
    }
    folder = parent / names["package"]
    files = {
        "pyproject.toml": PROJECT,
        f"{names['module']}.py": POLICY,
        f"test_{names['module']}.py": TEST,
        "README.md": README,
    }
    try:
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(text.format(**names), encoding="utf-8")
    except FileExistsError:
        raise FmsimError(f"{folder}: exists already; choose another name, or move it") from None
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # the whole package, or none of it
        raise FmsimError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another place"
        ) from None
    return folder

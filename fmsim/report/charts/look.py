"""How charts look: colours that stay apart for all eyes, on light and on dark paper, and shapes
that tell the same.
"""

from __future__ import annotations

# Okabe and Ito's colours (jfly.uni-koeln.de/color), which the colour-blind tell apart; their
# yellow is darker here, to be seen on white. On dark paper each is lighter.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b0568c", "#d99a00", "#2f9bd6", "#5d5400", "#5b5b5b")
DARK = ("#5ab4f0", "#ff7d33", "#3fd6a8", "#e58abf", "#e69f00", "#9ad8ff", "#f0e442", "#ffffff")
N_COLORS = len(LIGHT)
FULL_COLOR = 7  # grey or white: what everything is compared with
DASHES = {"solid": "", "dash": "7 4", "dot": "2 4", "dash dot": "8 3 2 3"}
FONT = "Inter, 'Segoe UI', system-ui, -apple-system, 'Helvetica Neue', Arial, sans-serif"


def _colors(colors: tuple[str, ...]) -> str:
    return "; ".join(f"--c{number}: {color}" for number, color in enumerate(colors))


def _classes() -> str:
    return "\n".join(f".chart .s{number} {{ --c: var(--c{number}) }}" for number in range(N_COLORS))


CSS = f"""
.chart {{ --ink: #1d2530; --soft: #566274; --line: #dfe5ed; --paper: #fff; --heat: 0, 114, 178;
  {_colors(LIGHT)}; font-family: {FONT}; }}
@media (prefers-color-scheme: dark) {{ .chart {{ --ink: #e8edf4; --soft: #a3b0c2; --line: #323c4a;
  --paper: #171d26; --heat: 90, 180, 240; {_colors(DARK)}; }} }}
{_classes()}
.chart text {{ fill: var(--soft); font-size: 12px }}
.chart .name {{ fill: var(--c); font-weight: 600; paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; stroke-linejoin: round }}
.chart .axis {{ fill: var(--ink) }}
.chart .grid {{ stroke: var(--line); stroke-width: 1 }}
.chart .mark {{ fill: var(--c); stroke: var(--paper); stroke-width: 1.5 }}
.chart .hollow {{ fill: var(--paper); stroke: var(--c); stroke-width: 2 }}
.chart .curve {{ fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round }}
.chart .lead {{ stroke: var(--c); stroke-width: 1; opacity: .55 }}
.chart .bar {{ fill: var(--c) }}
.chart .paper {{ fill: var(--paper) }}
.chart .cell {{ stroke: var(--paper); stroke-width: 2 }}
.chart .dark {{ fill: var(--paper) }}
.chart .item:focus {{ outline: none }}
.chart .item:focus .mark, .chart .item:focus .hollow, .chart .item:focus .bar,
.chart .item:focus .cell {{ stroke: var(--ink); stroke-width: 3 }}
.chart .item:focus .curve {{ stroke-width: 4 }}
""".strip()


def shape(kind: str, x: float, y: float, radius: float, name: str = "mark") -> str:
    """A mark's outline: exact policies are discs, lossy ones diamonds, bounds triangles, the full
    cache a square.
    """
    if kind == "disc":
        return f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'
    r = radius
    corners = {
        "diamond": ((0, -1.25 * r), (1.25 * r, 0), (0, 1.25 * r), (-1.25 * r, 0)),
        "triangle": ((0, -1.2 * r), (1.15 * r, 0.85 * r), (-1.15 * r, 0.85 * r)),
        "square": (
            (-0.9 * r, -0.9 * r),
            (0.9 * r, -0.9 * r),
            (0.9 * r, 0.9 * r),
            (-0.9 * r, 0.9 * r),
        ),
    }[kind]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="{name}" points="{points}"/>'

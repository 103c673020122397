"""docs/reference/presets.md: the hardware and the models that come with fmsim, from their files."""

from __future__ import annotations

from describe import item, section

from fmsim.experiments.models import listed
from fmsim.hw.spec import Figure, figure_names, hardware_names, load_hardware

GIB = 2**30
CONTEXT = 524_288
MEANINGS = {
    "n_gpus": "GPUs of a server",
    "hbm_bytes": "memory of a GPU",
    "hbm_bytes_per_s": "rate of that memory",
    "matmul_flops": "matrix operations a second, bf16",
    "reserve_bytes": "memory of a GPU that is neither weights nor KV",
    "host_bytes": "memory of the host, of the whole server",
    "host_reserve_bytes": "host memory that no mirror can have",
    "nvme_bytes": "drives of the whole server",
    "nvme_bytes_per_s": "rate at which all drives together are read",
    "nvme_usd_per_tb": "price of drives",
    "kernel_factor": "by which every kernel time is multiplied",
    "usd_per_gpu_hour": "price of a GPU",
    "link_bytes_per_s": "rate of the link between host and GPU, one direction",
}


def presets() -> str:
    return "\n".join([hardware(), figures(), models()])


def hardware() -> str:
    """A row a preset; a star marks a figure that is a guess."""
    rows = ["| preset | GPU | GPUs | GiB each | host GB | link GB/s |", "|---|---|---|---|---|---|"]
    for name in hardware_names():
        hw = load_hardware(name)
        rows.append(
            f"| `{name}` | {hw.title} | {hw.n_gpus} | {hw.hbm_bytes.value / GIB:.1f} |"
            f" {hw.host_bytes.value / 1e9:,.0f}{star(hw.host_bytes)} |"
            f" {hw.link.bandwidth_bytes_per_s.value / 1e9:.0f} |"
        )
    text = (
        "`fmsim hw list` prints the same. A star marks a guess. `fmsim hw calibrate` writes a"
        " preset of your own GPU."
    )
    return section("Hardware", text, iter(())) + "\n".join(rows) + "\n"


def star(figure: Figure) -> str:
    return "*" if figure.guess else ""


def figures() -> str:
    """What a scenario's `hardware_figures` may replace."""
    items = [item(f"`{name}`", MEANINGS[name]) for name in figure_names()]
    return section(
        "Figures",
        "A scenario's `hardware_figures` may replace any of these. Sizes are in bytes, rates in"
        " bytes a second. In a preset each has a `value`, its `source`, and `guess` where nobody"
        " measured it.",
        iter(items),
    )


def models() -> str:
    rows = [
        "| preset | family | layers | selecting | selections | bytes a token | GiB at 512K |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in listed():
        full = found["kv_bytes"][CONTEXT]
        rows.append(
            f"| `{found['name']}` | {found['family']} | {found['layers']} |"
            f" {found['paged_layers']} | {found['selections']} | {found['bytes_per_token']:,.0f} |"
            f" {full / GIB:.2f} |"
        )
    text = "`fmsim model show NAME` says what each kind of layer keeps."
    return section("Models", text, iter(())) + "\n".join(rows) + "\n"

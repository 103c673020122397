"""Which of others' kernels multiplies float8 rows, and that each gives what ours does."""

import json

import pytest

torch = pytest.importorskip("torch", reason="the kernels need fmsim[model]")

from kernel_pools import relative_error

from fmsim.exec.kernels.norms.rounded_rows import round_rows
from fmsim.exec.kernels.products import float8_products as products
from fmsim.exec.kernels.products.linear import linear, linear_reference, linear_triton
from fmsim.exec.kernels.weights import quantise

MADE = {
    "cards": {
        "A": [
            {
                "outputs": 4096,
                "inputs": 1024,
                "groups": 1,
                "ways": {"64": ["own"], "256": ["cublas", "own"]},
            },
            {"outputs": 512, "inputs": 8192, "groups": 1, "ways": {"64": ["another", "own"]}},
            {"outputs": 8192, "inputs": 4096, "groups": 8, "ways": {"64": ["own", "another"]}},
        ],
        "B": [{"outputs": 4096, "inputs": 1024, "groups": 1, "ways": {"64": ["another"]}}],
    }
}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(products, "_table", lambda: MADE)
    products.order.cache_clear()
    yield
    products.order.cache_clear()


@pytest.mark.parametrize(
    ("asked", "ways"),
    [
        (("A", 17, 4096, 1024, 1), ["own"]),
        (("A", 65, 4096, 1024, 1), ["cublas", "own"]),
        (("A", 9999, 4096, 1024, 1), ["cublas", "own"]),  # as the most that were measured
        (("A", 64, 640, 8192, 1), ["another", "own"]),  # as the nearest shape
        (("A", 64, 640, 8192, 4), ["own", "another"]),  # as what has groups
        (("B", 64, 640, 8192, 1), ["another"]),
        (("a new card", 64, 640, 8192, 1), ["another", "own"]),  # as the first
        (("B", 64, 640, 8192, 4), ["own"]),  # nothing alike was measured
    ],
)
def test_the_nearest_measurement_decides(table, asked, ways):
    assert list(products.order(*asked)) == ways


def test_the_shipped_table_names_ways_that_there_are():
    known = {products.OWN, *products.OWN_TUNES, *products.WAYS}
    for shapes in json.loads(products.TABLE.read_text())["cards"].values():
        for shape in shapes:
            assert shape["ways"] and all(set(ways) <= known for ways in shape["ways"].values())
            own = {products.OWN, *products.OWN_TUNES}  # these can always be had
            assert all(ways[-1] in own for ways in shape["ways"].values())


def test_elsewhere_than_on_a_hopper_gpu_ours_does_it():
    weight, scale = quantise(torch.randn(256, 256))
    rows = round_rows(torch.ones(64, 256).bfloat16())
    assert products.product(rows, weight, scale, 1, linear_triton) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [17, 64, 129, 1000])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_way_gives_the_references_product(monkeypatch, rows, groups):
    generator = torch.Generator("cuda").manual_seed(rows)
    weight, scale = quantise(torch.randn(384, 1024, device="cuda", generator=generator))
    x = torch.randn(rows, groups * 1024, device="cuda", generator=generator).bfloat16()
    expected = linear_reference(x, weight, scale, groups, True)
    for name in (*products.OWN_TUNES, *products.WAYS):
        monkeypatch.setattr(products, "order", lambda *_, name=name: [name])
        for given in (x, round_rows(x)):
            assert relative_error(linear(given, weight, scale, groups, True), expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_refuses_a_shape_is_not_asked_again(monkeypatch):
    asked = []

    def refuses(*given):
        asked.append(given)
        raise RuntimeError("not this one")

    monkeypatch.setattr(products, "WAYS", {"cublas": refuses})
    monkeypatch.setattr(products, "order", lambda *_: ["cublas", "own"])
    monkeypatch.setattr(products, "_refused", set())
    weight, scale = quantise(torch.randn(256, 512, device="cuda"))
    x = torch.ones(64, 512, device="cuda").bfloat16()
    for rows in (x, x[:33]):  # nor with other rows
        assert products.product(round_rows(rows), weight, scale, 1, linear_triton) is None
    assert len(asked) == 1

"""The page of arithmetic for 1 to 256 chips (experiments/benchmarks/scaling.py)."""

import importlib.util
import math

import pytest
from conftest import ROOT

SPEC = importlib.util.spec_from_file_location("scaling", ROOT / "experiments/benchmarks/scaling.py")
scaling = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scaling)

BATCH_NORM_WIDTHS = {  # of WRN-34-10, layer by layer: the first of each stage has the width before it
    "stage 1": [16] + [160] * 9,
    "stage 2": [160] + [320] * 9,
    "stage 3": [320] + [640] * 9,
    "last": [640],
}


@pytest.fixture(scope="module")
def found():
    return [(network, scaling.work_of(network)) for network in scaling.networks()]


def test_the_page_is_what_the_program_prints(found):
    assert (ROOT / "experiments/results/scaling.md").read_text() == scaling.page(found)


def test_parameters_are_the_published_ones():
    wide, small, large = (scaling.size_of(scaling.variables_of(n)[0]) for n in scaling.networks())
    assert round(wide / 1e6, 1) == 46.2  # Zagoruyko and Komodakis, RoBal
    assert round(small / 1e6, 1) == 11.2
    assert round(large / 1e6, 1) == 25.6  # He et al.


def by_hand(blocks, widen):
    """Multiplications with addition of a WideResNet on 32x32, from its definition alone."""
    total, before = 32 * 32 * 9 * 3 * 16, 16
    for size, width in ((32, 16 * widen), (16, 32 * widen), (8, 64 * widen)):
        total += size**2 * (9 * before * width + before * width)  # first convolution and shortcut
        total += size**2 * 9 * width**2 * (2 * blocks - 1)
        before = width
    return total + before * 10


def test_forward_operations_of_wide_resnets():
    network = scaling.networks()[0]
    assert scaling.flops(scaling.forward_program(network)) == 2 * by_hand(5, 10)
    config = network.config.copy_and_resolve_references()
    config.model.depth = 28
    shallower = scaling.flops(scaling.forward_program(network._replace(config=config)))
    assert shallower == 2 * by_hand(4, 10)
    assert shallower / 2e9 == pytest.approx(5.2, abs=0.05)  # published of WRN-28-10


def test_a_step_of_robal_is_sixteen_forward_passes(found):
    network, work = found[0]
    forward = scaling.flops(scaling.forward_program(network))
    first_layer = 2 * 32 * 32 * 9 * 3 * 16
    # The training passes need no gradient by the images, so the first layer's is left out twice.
    assert work.flops == pytest.approx(16 * forward - 2 * first_layer, rel=1e-4)


def test_what_a_step_sums_over_the_devices(found):
    network, work = found[0]
    widths = [width for stage in BATCH_NORM_WIDTHS.values() for width in stage]
    passes, there_and_back, mean_and_variance = 2, 2, 2
    assert len(work.batch_norm) == len(widths) * passes * there_and_back * mean_and_variance
    assert sum(work.batch_norm) == 4 * sum(widths) * passes * there_and_back * mean_and_variance
    params, stats = map(scaling.size_of, scaling.variables_of(network))
    applied = 4  # moments of adv, nat, nat, adv
    metrics = work.gradients - 4 * (params + applied * stats)
    assert 0 < metrics < 100


@pytest.mark.parametrize("chips", [8, 64, 256])
def test_the_ring(chips):
    links = (scaling.Links(most=256, rate=1e9, hop=0.0),)
    rate = scaling.LINK_SHARE * 1e9
    assert scaling.all_reduce_seconds(links, 1, 1e6) == 0.0
    assert scaling.all_reduce_seconds(links, 2, 1e6) == pytest.approx(1e6 / rate)
    assert scaling.all_reduce_seconds(links, chips, 1e6) == pytest.approx(2 * (1 - 1 / chips) * 1e6 / rate)
    hops = (scaling.Links(most=256, rate=math.inf, hop=1e-6),)
    assert scaling.all_reduce_seconds(hops, chips, 1e6) == pytest.approx(2e-6 * math.log2(chips))


def test_machines_of_eight_exchange_an_eighth():
    near, far = scaling.Links(8, 1e9, 0.0), scaling.Links(32, 1e8, 0.0)
    inside = scaling.all_reduce_seconds((near,), 8, 1e6)
    between = scaling.all_reduce_seconds((far,), 4, 1e6 / 8)
    assert scaling.all_reduce_seconds((near, far), 8, 1e6) == inside
    assert scaling.all_reduce_seconds((near, far), 32, 1e6) == pytest.approx(inside + between)


def test_every_link_reaches_the_largest_number_of_chips():
    for chip in scaling.HARDWARE:
        assert math.prod(link.most for link in chip.links) >= scaling.CHIPS[-1]


def test_one_chip_is_fully_efficient_and_more_are_less_so(found):
    for chip in scaling.HARDWARE:
        for _, work in found:
            shares = [scaling.efficiency(*scaling.step_seconds(chip, work, n, 64)) for n in scaling.CHIPS]
            assert shares[0] == 1.0
            assert shares == sorted(shares, reverse=True)
            assert shares[-1] < 0.99

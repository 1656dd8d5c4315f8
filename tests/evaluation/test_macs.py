"""The MAC counter against XLA's cost analysis, and the share of the subsampling convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from edgespeech.errors import InputError
from edgespeech.evaluation.macs import count_macs
from edgespeech.nn.subsampling import Subsampling


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def xla_macs(function, *args):
    """Half of the floating-point operations that XLA counts in the program before it optimises it."""
    return jax.jit(function).lower(*args).cost_analysis()["flops"] / 2


@pytest.mark.parametrize(
    ("equation", "left", "right", "macs"),
    [
        ("ij,jk->ik", (3, 5), (5, 7), 105),
        ("bij,bkj->bik", (2, 3, 5), (2, 7, 5), 210),
        ("bchq,bkhc->bkhq", (2, 4, 1, 3), (2, 6, 1, 4), 144),
        ("ij,ij->", (3, 5), (3, 5), 15),
    ],
)
def test_products(equation, left, right, macs):
    def function(a, b):
        return jnp.einsum(equation, a, b)

    counts = count_macs(function, shape(*left), shape(*right))
    assert dict(counts) == {"dot_general": macs}
    assert xla_macs(function, shape(*left), shape(*right)) == macs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_strides": (2, 3)},
        {"padding": [(1, 1), (2, 0)]},
        {"padding": [(1, 2), (0, 3)], "rhs_dilation": (2, 1), "window_strides": (2, 1)},
        {"lhs_dilation": (2, 3), "padding": [(1, 1), (0, 0)]},
        {"feature_group_count": 2},
        {"feature_group_count": 6},
        {"batch_group_count": 2},
    ],
)
def test_convolutions(options):
    options = {"window_strides": (1, 1), "padding": "VALID"} | options
    inputs = 6 // options.get("feature_group_count", 1)

    def function(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
        )

    arguments = shape(4, 11, 13, 6), shape(3, 2, inputs, 12)
    counts = count_macs(function, *arguments)
    assert list(counts) == ["conv_general_dilated"]
    assert counts.total() == xla_macs(function, *arguments)


def test_a_convolution_by_hand():
    def function(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")
        )

    # 5 outputs with 3 taps each, of which two meet padding; 2 channels in, 7 out.
    assert count_macs(function, shape(1, 5, 2), shape(3, 2, 7)).total() == 13 * 2 * 7


def test_programs_inside_programs():
    w = shape(4, 4)

    @jax.custom_vjp
    def custom(x, w):
        return x @ w

    custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

    def body(x, w):
        return jax.checkpoint(lambda x: custom(jax.jit(jnp.matmul)(x, w), w))(x)

    def scanned(x, w):
        return lax.scan(lambda x, _: (body(x, w), None), x, None, length=5)[0]

    def unrolled(x, w):
        for _ in range(5):
            x = body(x, w)
        return x

    for transform, factor in (
        (lambda f: f, 10),
        (lambda f: jax.grad(lambda x, w: f(x, w).sum()), 0),
    ):
        one = count_macs(transform(scanned), shape(3, 4), w)
        other = count_macs(transform(unrolled), shape(3, 4), w)
        assert one == other
        assert not factor or one.total() == factor * 3 * 4 * 4
    assert xla_macs(unrolled, shape(3, 4), w) == count_macs(scanned, shape(3, 4), w).total()


def test_the_dearest_branch_counts():
    def function(x, w):
        return lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert count_macs(function, shape(3, 4), shape(4, 4)).total() == 2 * 48


def test_a_loop_of_unknown_length_is_refused():
    def function(x, w):
        return lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x)

    with pytest.raises(InputError, match="while loop with 48 MACs a turn"):
        count_macs(function, shape(3, 4), shape(4, 4))
    assert count_macs(lambda x: lax.while_loop(lambda x: x < 1, lambda x: x + 1, x), 0.0) == {}


def test_element_wise_operations_count_nothing():
    assert count_macs(lambda x: jnp.exp(x) * x + x.sum(), shape(3)).total() == 0


def conformer_layer(x, w, kernel):
    """The products of a Conformer layer (arXiv 2005.08100) with feed-forward 4 d and full attention."""
    for half in range(2):
        x = x + jnp.maximum(x @ w["expand"][half], 0) @ w["contract"][half]
    q, k, v = (x @ w["attention"][i] for i in range(3))
    x = x + jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v @ w["attention"][3]
    y = x @ w["gate"][0] * (x @ w["gate"][1])
    y = lax.conv_general_dilated(
        y,
        kernel,
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=y.shape[2],
    )
    return x + y @ w["gate"][2]


@pytest.mark.parametrize(
    ("layers", "vanilla_share", "separable_share"), [(13, "32.8%", "4.0%"), (12, "34.5%", "4.2%")]
)
def test_share_of_the_subsampling_convolutions(layers, vanilla_share, separable_share):
    """80 mel bins, d 384, kernel 31, 21 s: the convolutions' share of the vanilla encoder's MACs."""
    d, frames = 384, 2098
    counts = {}
    for separable in (False, True):
        module = nnx.eval_shape(
            lambda s=separable: Subsampling(80, d, separable=s, rngs=nnx.Rngs(0))
        )
        graphdef, state = nnx.split(module)
        counts[separable] = count_macs(
            lambda state, x, n, g=graphdef: nnx.merge(g, state)(x, n)[0],
            state,
            shape(1, frames, 80),
            shape(1, dtype=jnp.int32),
        )
    n = Subsampling.num_frames(frames)
    w = {
        "expand": shape(2, d, 4 * d),
        "contract": shape(2, 4 * d, d),
        "attention": shape(4, d, d),
        "gate": shape(3, d, d),
    }
    layer = count_macs(conformer_layer, shape(1, n, d), w, shape(31, 1, d))
    # 16 d^2 for the feed-forward networks, 4 d^2 for attention and 3 d^2 for the convolution module.
    taps = 31 * n - 2 * sum(range(16))
    assert layer.total() == 23 * n * d * d + 2 * n * n * d + taps * d
    total = counts[False].total() + layers * layer.total()
    shares = [counts[s]["conv_general_dilated"] / total for s in (False, True)]
    assert [f"{share:.1%}" for share in shares] == [vanilla_share, separable_share]
    ratio = counts[False]["conv_general_dilated"] / counts[True]["conv_general_dilated"]
    assert ratio == pytest.approx(8.12, abs=0.01)
    assert counts[False]["dot_general"] == counts[True]["dot_general"] == n * 19 * d * d


def test_counts_do_not_run_anything():
    huge = shape(10**6, 10**6)
    assert count_macs(jnp.matmul, huge, huge).total() == 10**18
    assert isinstance(count_macs(lambda x: x @ x, np.ones((2, 2))).total(), int)

"""Which precision is chosen where, and what float16 is refused for."""

from __future__ import annotations

import numpy as np
import pytest

from eval.store.precision import choose_precision, cpu_flags, kept


@pytest.mark.parametrize(
    ("asked", "flags", "arithmetic", "features", "why"),
    [
        ("auto", ("avx2",), "fp32", "float32", "neither avx512_bf16 nor amx_bf16"),
        ("auto", (), "fp32", "float32", "neither"),
        ("auto", ("avx512f", "avx512_bf16"), "bf16", "float16", "this CPU has avx512_bf16"),
        ("auto", ("amx_bf16", "avx512_bf16"), "bf16", "float16", "amx_bf16, avx512_bf16"),
        ("fp32", ("amx_bf16",), "fp32", "float32", "as asked"),
        ("bf16", ("avx2",), "bf16", "float16", "fp32 is faster here"),
    ],
)
def test_of_a_cpu(asked, flags, arithmetic, features, why):
    found = choose_precision(asked, "cpu", frozenset(flags))
    assert (found.arithmetic, found.features) == (arithmetic, features)
    assert why in found.why


@pytest.mark.parametrize(("has", "arithmetic"), [(True, "bf16"), (False, "fp32")])
def test_of_a_gpu(monkeypatch, has, arithmetic):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "H200")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has)
    assert choose_precision("auto", "cuda:1").arithmetic == arithmetic
    if not has:
        with pytest.raises(ValueError, match="H200 has no units for"):
            choose_precision("bf16", "cuda:1")


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="it must be one of auto, fp32, bf16"):
        choose_precision("fp16", "cpu")
    assert isinstance(cpu_flags(), frozenset)


def test_what_float16_cannot_hold_is_refused():
    half = np.dtype(np.float16)
    values = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    np.testing.assert_allclose(kept(values, half, "features"), values, rtol=2**-11)
    assert kept(values, np.dtype(np.float32), "features") is values
    with pytest.raises(ValueError, match=r"features reach 1e\+06.*--precision fp32"):
        kept(np.full((2, 2), 1e6, np.float32), half, "features")
    with pytest.raises(ValueError, match="where float16 has few bits"):
        kept(values * 1e-7, half, "features")
    assert np.isnan(kept(np.full((1, 1), np.nan, np.float32), half, "features")).all()
    assert not kept(np.zeros((2, 2), np.float32), half, "features").any()

"""At which precision frozen networks compute, and what is decided in fp32 all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import build, config_data, random_batch
from torch import Tensor, nn

from pretrain.config.load import parse_config
from pretrain.encoders import build_encoder
from pretrain.encoders.vit.config import VitConfig
from pretrain.engines.precision import allow_fast_products, exactly, slow_precision
from pretrain.methods.dvae.config import DvaeConfig
from pretrain.methods.dvae.network import DvaeEncoder, DvaeTokenizer
from pretrain.methods.frozen import Frozen
from pretrain.methods.vqkd.network import TaskHead, VqkdTokenizer

CODES = 64


def vqkd_tokenizer() -> VqkdTokenizer:
    encoder = build_encoder(VitConfig(dim=48, depth=2, heads=2, patch=4, pool="mean"), (32, 32))
    codebook = nn.functional.normalize(torch.randn(CODES, 16), dim=-1)
    return VqkdTokenizer(encoder, TaskHead(48, 16), codebook, (0.5,) * 3, (0.25,) * 3)


def dvae_tokenizer() -> DvaeTokenizer:
    return DvaeTokenizer(DvaeEncoder(DvaeConfig(vocab_size=CODES, hidden=16, blocks_per_group=1, groups=3), 3))


def crops(count: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_frozen_network_computes_at_the_precision_of_the_run() -> None:
    network = Frozen(nn.Linear(8, 8))
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert network(inputs).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert network(inputs).dtype == torch.bfloat16
    assert network.network.weight.dtype == torch.float32


@pytest.mark.parametrize("make", [vqkd_tokenizer, dvae_tokenizer])
def test_codes_in_bf16_are_those_in_fp32_but_where_two_are_as_near(make: type) -> None:
    torch.manual_seed(0)
    tokenizer = make()
    frozen, images = Frozen(tokenizer), crops()
    exact = frozen(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = frozen(images)
    agree = (exact == rounded).float().mean()
    assert agree > 0.9, f"{agree:.1%} of the codes agree"
    assert len(exact.unique()) > 4, "a tokenizer that gives one code agrees with anything"


def test_a_dvae_decides_by_logits_in_fp32() -> None:
    """In bf16 they would have 8 bits, many of the largest would be equal, and the first of those would win."""
    torch.manual_seed(0)
    tokenizer = dvae_tokenizer()
    seen: list[torch.dtype] = []
    tokenizer.encoder.layers[-1].register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        codes = tokenizer(crops())
    assert seen == [torch.float32]
    assert codes.dtype == torch.int64


def test_a_frozen_tokenizer_decides_as_the_one_that_was_trained(shards: Path, tmp_path: Path) -> None:
    """Under the same autocast: what codes are to BEiT, they were to VQ-KD."""
    method = build(parse_config(config_data("vqkd", "vit", shards, tmp_path))).eval()
    images = crops(4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        codes, _ = method.codebook(method.vectors(images).flatten(0, 1))
        assert torch.equal(method.tokenizer()(images).flatten(), codes)


def test_the_teacher_of_vqkd_is_listened_to_in_fp32(shards: Path, tmp_path: Path) -> None:
    config = parse_config(config_data("vqkd", "vit", shards, tmp_path))
    method, images = build(config), random_batch(config)["global_crops"][:, 0]
    exact = method.wanted(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method.wanted(images)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert nn.functional.cosine_similarity(rounded, exact, dim=-1).min() > 0.999


def test_exactly_puts_back_what_it_found() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with exactly(torch.device("cpu")):
                assert torch.get_float32_matmul_precision() == "highest"
                assert not torch.backends.cudnn.allow_tf32  # a dVAE's last layer, which chooses codes, is a convolution
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_only_a_gpu_rounds_the_factors_of_products() -> None:
    allow_fast_products(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    try:
        allow_fast_products(torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_bf16_without_its_instructions_is_told(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(precision: str, device: str = "cpu") -> str | None:
        engine = parse_config(config_data("mae", "vit", shards, tmp_path, engine={"precision": precision})).engine
        return slow_precision(engine, torch.device(device))

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    told = line("bf16")
    assert told is not None
    assert "set engine.precision=fp32" in told
    assert line("fp32") is None
    assert line("bf16", "cuda") is None
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    assert line("bf16") is None

"""Attentive probes against values recorded from their authors' code: logits, loss and the gradient of every weight."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.pooling import CrossAttention, EfficientProbing, Pooling, ProjectedAttention


def recorded(name: str) -> dict[str, Any]:
    folder = os.environ.get("SELFSIGHT_PARITY")
    if not folder:
        pytest.skip("set SELFSIGHT_PARITY to the folder of recorded values")
    return torch.load(Path(folder) / name, weights_only=True)


def check(ours: Pooling, record: dict[str, Any], tokens: Tensor, theirs: dict[str, Tensor], grads: dict[str, Tensor]):
    """The classifier with the weights `theirs`, by our names, gives the recorded values and gradients."""
    assert set(theirs) == {name for name, _ in ours.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(theirs[name].reshape(parameter.shape))
    logits = ours(tokens)[0]
    torch.testing.assert_close(logits, record["outputs"]["logits"], rtol=0, atol=1e-5)
    loss = (logits * record["cotangents"]["logits"] + logits**2 / 2).mean()
    torch.testing.assert_close(loss, record["loss"], rtol=1e-5, atol=0)
    loss.backward()
    for name, parameter in ours.named_parameters():
        wanted = grads[name].reshape(parameter.shape)
        assert (parameter.grad - wanted).norm() <= 1e-3 * wanted.norm(), name


def split_pairs(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`kv` as `k` and `v`; without the keys' bias, which gets no gradient."""
    found = {name: value for name, value in weights.items() if not name.startswith("kv_")}
    found["k_weight"], found["v_weight"] = weights["kv_weight"].chunk(2)
    found["v_bias"] = weights["kv_bias"].chunk(2)[1]
    return found


def test_v_jepa() -> None:
    record = recorded("vjepa_attentive.pt")

    def ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, value in weights.items():
            short = name.removeprefix("pooler.").removeprefix("cross_attention_block.")
            short = short.replace("query_tokens", "query").removeprefix("xattn.").removeprefix("mlp.")
            if not short.startswith("proj."):
                found[short.replace(".", "_")] = value
        return split_pairs(found)

    config = record["config"]
    head = CrossAttention(config["embed_dim"], config["num_classes"], heads=config["num_heads"])
    check(head, record, record["inputs"]["x"], ours(record["state_dict"]), ours(record["grads"]))
    pooled = head.pooled(head.keep(record["inputs"]["x"]))[0]
    torch.testing.assert_close(pooled, record["outputs"]["pooled"][:, 0], rtol=0, atol=1e-5)


def test_capi_as_fino_has_it() -> None:
    record = recorded("fino_attentive.pt")
    config = record["config"]

    def ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {"query_token": "query", "input_proj": "input", "ln": "norm"}
        found = {}
        for name, value in weights.items():
            stem, _, rest = name.partition(".")
            found["_".join(filter(None, (renamed.get(stem, stem), rest)))] = value
        return split_pairs(found)

    tokens = torch.cat(record["inputs"]["patches"], dim=-1)
    torch.testing.assert_close(tokens, record["outputs"]["attention_input"])
    head = ProjectedAttention(
        tokens.shape[-1], config["classes"], width=config["embed_dim"], heads=config["heads"]
    )  # fmt: skip
    check(head, record, tokens, ours(record["state_dict"]), ours(record["grads"]))


def test_efficient_probing() -> None:
    record = recorded("efficient_probing.pt")
    renamed = {"0.cls_token": "queries", "0.v.weight": "v_weight", "2.weight": "linear_weight", "2.bias": "linear_bias"}

    def ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {renamed[name]: value for name, value in weights.items() if name in renamed}

    config, state = record["config"], record["state_dict"]
    head = EfficientProbing(config["dim"], config["classes"], queries=config["queries"])
    head.running_mean.copy_(state["1.running_mean"])
    head.running_var.copy_(state["1.running_var"])
    check(head, record, record["inputs"]["x"], ours(state), ours(record["grads"]))
    after = record["buffers_after"]
    torch.testing.assert_close(head.running_mean[0], after["1.running_mean"])
    torch.testing.assert_close(head.running_var[0], after["1.running_var"])

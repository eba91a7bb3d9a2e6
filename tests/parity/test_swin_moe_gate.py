"""Swin-MoE's routers, places and balance losses against tutel's, recorded."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from parity_files import recorded, relative_error

from pretrain.encoders.swin_moe.gate import CosineGate, LinearGate
from pretrain.encoders.swin_moe.routing import balance_loss, capacity_of, choose, ranks_within

ONE_GROUP = "t e -> 1 t e"


def test_routes_and_balance_losses_are_tutels() -> None:
    record = recorded("swin_moe_gate.pt")
    config, inputs, state = record["config"], record["inputs"], record["state_dict"]
    experts, deviation = config["experts"], config["gate_noise"] / config["experts"]
    gates = {
        "linear": LinearGate(config["dim"], experts),
        "cosine": CosineGate(config["dim"], experts, config["proj_dim"]),
    }
    total = torch.zeros(())
    for kind, gate in gates.items():
        theirs = record["outputs"][kind]
        start = f"{kind}."
        gate.load_state_dict({key.removeprefix(start): each for key, each in state.items() if key.startswith(start)})
        logits = gate(inputs["x"])
        torch.testing.assert_close(logits, theirs["logits"], atol=1e-5, rtol=0)
        noisy = logits + inputs["noise"] * deviation
        scores = noisy.softmax(dim=-1)
        torch.testing.assert_close(scores, theirs["scores"], atol=1e-5, rtol=0)

        choice = choose(rearrange(scores, ONE_GROUP), config["top_k"])
        assert torch.equal(choice.experts[0, :, 0], theirs["expert"][0].long())
        torch.testing.assert_close(choice.gates[0, :, 0], theirs["gate"][0], atol=1e-6, rtol=0)
        slots = ranks_within(choice, experts, prioritised=True)
        assert torch.equal(slots[0, :, 0], theirs["slot"][0].long())
        capacity = capacity_of(config["tokens"], experts, config["top_k"], config["capacity_factor"])
        assert capacity == theirs["capacity"]

        groups = [rearrange(each, ONE_GROUP) for each in (logits, noisy)]
        for name in ("importance_load", "gshard"):
            loss = balance_loss(name, *groups, choice, deviation)
            assert loss.item() == pytest.approx(float(theirs[f"{name}_loss"]), rel=1e-5), (kind, name)
            total = total + loss
    assert total.item() == pytest.approx(float(record["loss"]), rel=1e-5)
    total.backward()
    found = {f"{kind}.{name}": each for kind, gate in gates.items() for name, each in gate.named_parameters()}
    assert found.keys() == record["grads"].keys()
    for name, gradient in record["grads"].items():
        assert relative_error(found[name].grad, gradient) < 1e-3, name

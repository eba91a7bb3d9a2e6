"""SIGReg and LeJEPA's loss against recorded values; see test_parity.py."""

from __future__ import annotations

import torch
from parity_files import recorded, relative_error

from pretrain.methods import sigreg

CPU = torch.device("cpu")


def test_knots_are_the_authors() -> None:
    theirs = recorded("lejepa.pt")["outputs"]["minimal"]
    for ours, name in zip(sigreg.knots(0.0, 3.0, 17, CPU), ("t", "phi", "weights"), strict=True):
        torch.testing.assert_close(ours, theirs[name], atol=1e-6, rtol=0)


def test_the_sliced_statistic() -> None:
    record = recorded("lejepa.pt")
    name = "epps_pulley_sliced"
    rows = record["inputs"][name]["x"].clone().requires_grad_()
    places, normal, weights = sigreg.knots(0.0, 3.0, 17, CPU)
    own = sigreg.waves(rows, record["inputs"][name]["directions"], places)
    found = sigreg.epps_pulley(own, own.detach(), normal, weights, len(rows))
    torch.testing.assert_close(found, record["outputs"][name]["per_slice"], atol=1e-4, rtol=1e-5)
    found.mean().backward()
    torch.testing.assert_close(found.mean(), record["loss"][name], rtol=1e-5, atol=0)
    assert relative_error(rows.grad, record["grads"][name]["x"]) < 1e-3


def test_the_minimal_loss() -> None:
    record = recorded("lejepa.pt")
    theirs = record["outputs"]["minimal"]
    views = record["inputs"]["minimal"]["proj"].clone().requires_grad_()
    places, normal, weights = sigreg.knots(0.0, 3.0, 17, CPU)
    own = sigreg.waves(views, theirs["directions"], places)
    spread = sigreg.epps_pulley(own, own.detach(), normal, weights, views.shape[1]).mean()
    torch.testing.assert_close(spread, theirs["sigreg"], rtol=1e-5, atol=0)
    disagreement = (views - views.mean(dim=0)).square().mean()
    torch.testing.assert_close(disagreement, theirs["invariance"], rtol=1e-5, atol=0)
    loss = 0.02 * spread + 0.98 * disagreement
    torch.testing.assert_close(loss, record["loss"]["minimal"], rtol=1e-5, atol=0)
    loss.backward()
    assert relative_error(views.grad, record["grads"]["minimal"]["proj"]) < 1e-3


def test_fino_s_form_counts_no_rows() -> None:
    record = recorded("fino_attentive.pt")["sigreg"]
    rows = record["z"].clone().requires_grad_()
    places, normal, weights = sigreg.knots(-5.0, 5.0, 17, CPU)
    own = sigreg.waves(rows, record["directions"], places)
    found = sigreg.epps_pulley(own, own.detach(), normal, weights).mean()
    torch.testing.assert_close(found, record["loss"], rtol=1e-5, atol=0)
    found.backward()
    assert relative_error(rows.grad, record["z_grad"]) < 1e-3

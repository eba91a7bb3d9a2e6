"""Trouble named while it happens: in the log, in wandb, in the run's history and, where asked, by exit code 87."""

from pretrain.diagnostics.knn import knn_line, named_data
from pretrain.diagnostics.non_finite import NonFiniteError, TroubleError, check_finite
from pretrain.diagnostics.watch import Diagnostics

__all__ = ["Diagnostics", "NonFiniteError", "TroubleError", "check_finite", "knn_line", "named_data"]

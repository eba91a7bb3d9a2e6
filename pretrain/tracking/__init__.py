"""What a run writes down: metrics and pictures as files, and the same in wandb."""

from pretrain.tracking.pictures import contact_sheet
from pretrain.tracking.probes import Accuracy, log_lone_probe, log_probe
from pretrain.tracking.tracker import Tracker

__all__ = ["Accuracy", "Tracker", "contact_sheet", "log_lone_probe", "log_probe"]

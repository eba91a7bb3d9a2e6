"""What a run writes down: metrics and pictures as files, and the same in wandb."""

from pretrain.tracking.pictures import contact_sheet
from pretrain.tracking.tracker import Tracker, log_probe

__all__ = ["Tracker", "contact_sheet", "log_probe"]

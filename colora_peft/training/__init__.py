"""What stands behind examples/finetune.py and examples/pretrain.py.

`train` is the loop: exact to resume, on one process or many. Nothing in the library imports this package; it is
installed so that a job on a cluster needs no clone.
"""

from .arguments import TrainArguments
from .checkpoint import list_checkpoints, read_state
from .loop import DataFailed, TrainingDiverged, reconstruct, restoration_loss, train, use_all_cores
from .methods import LEARNING_RATES, METHODS, Method, prepare_for_tuning, trained_parameters
from .output_dir import check_output_dir, open_output_dir
from .trackers import create_accelerator

__all__ = [
    "DataFailed",
    "LEARNING_RATES",
    "METHODS",
    "Method",
    "TrainArguments",
    "TrainingDiverged",
    "check_output_dir",
    "create_accelerator",
    "list_checkpoints",
    "open_output_dir",
    "prepare_for_tuning",
    "read_state",
    "reconstruct",
    "restoration_loss",
    "train",
    "trained_parameters",
    "use_all_cores",
]

"""The machinery behind examples/finetune.py, pretrain.py and contribution.py.

`train` is the loop: exact to resume, on one process or many. Nothing in the library imports this package; it is
installed so that a job on a cluster needs no clone.
"""

from colora_peft.inference import reconstruct, restoration_loss

from .arguments import OnResume, TrainArguments
from .best import BEST_FOLDER, read_best, save_result
from .checkpoint import list_checkpoints, prolonged_in_words, read_state
from .loop import DataFailed, TrainingDiverged, train, use_all_cores
from .loss import TrainingLoss, checkerboard_obstacle
from .merge_check import leave_wrong_layers_alone
from .methods import LEARNING_RATES, METHODS, Method, check_can_be_saved, prepare_for_tuning, trained_parameters
from .network_checks import (
    check_base_can_be_made_again,
    check_budget,
    check_result_is_finite,
    check_takes_images,
    refusals_in_words,
    result_diverged,
)
from .output_dir import check_output_dir, open_output_dir
from .saved import compare_saved
from .signals import TrainingStopped
from .task import (
    CONTRIBUTIONS_FILE,
    FIGURE_FILE,
    TaskArguments,
    check_targets_differ,
    load_contributions,
    load_network,
    load_pairs,
    measure_contributions,
    note_on_source,
    open_pairs,
    report_allocation,
)
from .trackers import create_accelerator

__all__ = [
    "BEST_FOLDER",
    "CONTRIBUTIONS_FILE",
    "DataFailed",
    "FIGURE_FILE",
    "LEARNING_RATES",
    "METHODS",
    "Method",
    "OnResume",
    "TaskArguments",
    "TrainArguments",
    "TrainingDiverged",
    "TrainingLoss",
    "TrainingStopped",
    "check_base_can_be_made_again",
    "check_budget",
    "check_can_be_saved",
    "check_output_dir",
    "check_result_is_finite",
    "check_takes_images",
    "check_targets_differ",
    "checkerboard_obstacle",
    "compare_saved",
    "create_accelerator",
    "leave_wrong_layers_alone",
    "list_checkpoints",
    "load_contributions",
    "load_network",
    "load_pairs",
    "measure_contributions",
    "note_on_source",
    "open_output_dir",
    "open_pairs",
    "prepare_for_tuning",
    "prolonged_in_words",
    "read_best",
    "read_state",
    "reconstruct",
    "refusals_in_words",
    "report_allocation",
    "restoration_loss",
    "result_diverged",
    "save_result",
    "train",
    "trained_parameters",
    "use_all_cores",
]

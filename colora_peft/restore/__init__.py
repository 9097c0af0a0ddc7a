"""The machinery behind `colora-restore`, examples/restore.py and the demo page, app.py.

Files and results (`plan`), adapters (`adapters`), the way from one to the other (`run`, `photo`), and what results
were made with (`record`, `report`). `command` is the program. Nothing in the library imports this package.
"""

from .adapters import MAX_STRENGTH, NO_ADAPTER, AdapterSet, adapter_labels, adapters_in
from .arguments import RestoreArguments
from .command import restore_images, run_command
from .photo import PhotoRestorer
from .plan import plan_jobs
from .record import RestoreRecord
from .report import Row, Table, report_of
from .run import RestoreRun

__all__ = [
    "AdapterSet",
    "MAX_STRENGTH",
    "NO_ADAPTER",
    "PhotoRestorer",
    "RestoreArguments",
    "RestoreRecord",
    "RestoreRun",
    "Row",
    "Table",
    "adapter_labels",
    "adapters_in",
    "plan_jobs",
    "report_of",
    "restore_images",
    "run_command",
]

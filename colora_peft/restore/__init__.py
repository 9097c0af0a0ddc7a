"""What stands behind examples/restore.py and the demo page.

Which files are restored and where results go (`plan`), with which adapters (`adapters`), and what they were made with
(`record`). Nothing in the library imports this package.
"""

from .adapters import NO_ADAPTER, AdapterSet, adapter_labels
from .plan import Job, plan_jobs
from .record import RestoreRecord, file_digest

__all__ = ["AdapterSet", "Job", "NO_ADAPTER", "RestoreRecord", "adapter_labels", "file_digest", "plan_jobs"]

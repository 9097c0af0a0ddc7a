"""State of a training run besides its loop: its position, its checkpoints, its log and its progress bar."""

from __future__ import annotations

import copy
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from colora_peft.data import PairSource, Position
from colora_peft.utils import Processes, share_weights

from .arguments import OnResume, TrainArguments, flags_with
from .best import BestStep, save_result
from .checkpoint import checkpoint_tensors, load_checkpoint, read_state, save_checkpoint
from .ema import ExponentialMovingAverage
from .engine import Engine
from .fsdp import WholeNetwork
from .identity import RunIdentity
from .log import append_row, cut_rows
from .signals import TrainingStopped
from .skipped_images import SkippedImages, TooManySkipped
from .trackers import log_figures
from .validation import VALIDATION_LOG, line_of, validate

_LOG_FILE = "train_log.jsonl"
_LOG_EVERY_STEPS = 20


@dataclass(frozen=True)
class StepFigures:
    """Figures of a step over all processes.

    Attributes:
        loss: Mean loss.
        psnr: Mean PSNR in dB.
        norm: Norm of the gradient before clipping.
        finite: Whether loss and gradient are finite.
        stop_signal: Number of the signal that asks the run to stop, if any process got one.
        skipped: Reasons why images of this step were skipped.
        position: Position of this process in its stream.
    """

    loss: float
    psnr: float
    norm: float
    finite: bool
    stop_signal: int | None = None
    skipped: list[str] = field(default_factory=list)
    position: Position | None = None


class TrainingRun:
    """A run of `model` by `engine`; files and the progress bar are the main process's.

    Args:
        model: The network, without what the engine has put around it.
        engine: Steps the parameters that require gradients.
        args: The run's settings.
        accelerator: That of the run.
        dataset: Training samples. It may have a `digest` and a `max_skipped_share`.
        network: Gives the network as it is evaluated and saved.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        args: TrainArguments,
        accelerator: Accelerator,
        dataset: Dataset,
        network: WholeNetwork,
    ) -> None:
        self.model = model
        self.network = network
        self.engine = engine
        self.args = args
        self.accelerator = accelerator
        self.averages = ExponentialMovingAverage(model, args.ema_decay) if args.use_ema else None
        self.output_dir = Path(args.output_dir)
        self.best = BestStep(self.output_dir, accelerator) if args.save_best else None
        self.position: Position | None = None
        self._prolonged: list[dict[str, int]] = []  # the `step` of each time, and the steps `planned` before it
        max_share = getattr(dataset, "max_skipped_share", 0.0)
        self._skipped = SkippedImages(self.output_dir, max_share, accelerator.is_main_process)
        self._identity = RunIdentity.of(model, args, accelerator, dataset)
        self._recent: list[tuple[float, float]] = []
        self._recent_seconds = 0.0
        self._step_started = self._started = time.perf_counter()
        self._earlier_seconds = 0.0
        self._bar: tqdm | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a restart included."""
        return self._earlier_seconds + time.perf_counter() - self._started

    # ------------------------------------------------------------------------------------------------- checkpoints

    def resume(self, checkpoint: Path | None) -> int:
        """Loads a checkpoint, if there is one, and returns the number of steps done.

        Raises:
            ValueError: if the checkpoint belongs to another model, method version, dataset, precision or global batch,
                or was at places in a stream for another number of processes; nothing was changed.
        """
        if checkpoint is None:
            return 0
        saved = read_state(checkpoint)
        self._identity.check(checkpoint, saved, self.args.allow_changed_dataset)
        self._check_same_processes(checkpoint, saved.get("positions"))
        averages = None if self.averages is None else self.averages.averages
        state, self.engine.state = load_checkpoint(checkpoint, self.model, averages)
        self._earlier_seconds = state.get("seconds", 0.0)
        if state.get("positions"):
            self.position = state["positions"][self.accelerator.process_index]
        self._prolonged = state.get("prolonged", [])
        self._note_new_length(state["arguments"], state["step"])
        self._skipped.resume(state["step"], state.get("skipped", 0))
        # Under fp16 the scale of the loss was found over many steps; without it a resumed run would skip some.
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.accelerator.is_main_process:
            for name in (_LOG_FILE, VALIDATION_LOG):
                cut_rows(self.output_dir / name, state["step"])
        return state["step"]

    def _note_new_length(self, before: dict[str, Any], step: int) -> None:
        """Says which learning rates a run of another length has, unless those so far would have been the same."""
        planned = copy.copy(self.args)
        for name in flags_with(OnResume.LENGTH, planned):
            setattr(planned, name, before.get(name, getattr(planned, name)))
        last, same, following = (
            planned.learning_rate_at(step - 1),
            self.args.learning_rate_at(step - 1),
            self.args.learning_rate_at(step),
        )
        if step == 0 or last == same:
            return
        self._prolonged = [*self._prolonged, {"step": step, "planned": planned.max_train_steps}]
        self.accelerator.print(
            f"The run is prolonged after step {step} from {planned.max_train_steps} steps to "
            f"{self.args.max_train_steps}: the learning rate was {last:.3g}, is {following:.3g} now, and from here on "
            "that of a run of the new length."
        )

    def _check_same_processes(self, checkpoint: Path, positions: list[Position] | None) -> None:
        if positions and len(positions) != self.accelerator.num_processes:
            raise ValueError(
                f"{checkpoint} was trained on a stream by {len(positions)} processes, which share out its order: this "
                f"run has {self.accelerator.num_processes}; launch as many."
            )

    def save(self, step: int) -> Path:
        """Saves a checkpoint of the state after `step` steps; every process returns when it is complete, or fails."""
        path = self.output_dir / f"checkpoint-{step}"
        processes = Processes(self.accelerator)
        positions = processes.lists_of_all([self.position])
        averages = None if self.averages is None else self.averages.averages
        files = checkpoint_tensors(self.model, self.engine.state, averages)
        # Together: a process that ended earlier would have the launcher kill the one that writes.
        with processes.failing_together():
            if self.accelerator.is_main_process:
                scaler = self.accelerator.scaler
                state = {
                    "step": step,
                    "seconds": self.seconds,
                    **self._identity.as_state(),
                    "scaler": None if scaler is None else scaler.state_dict(),
                    "positions": None if positions[0] is None else positions,
                    "skipped": self._skipped.count,
                    "prolonged": self._prolonged,
                    "arguments": asdict(self.args),
                }
                limit = self.args.checkpoints_total_limit or None
                path = save_checkpoint(self.output_dir, files, state, limit)
        return path

    def save_last_good(self) -> Path:
        """Saves the network as a user loads it, if it knows how to save itself, and returns the folder."""
        folder = self.output_dir / "last_good"
        with self._result_weights():
            network = self.network.get(self.model)
            if not hasattr(network, "save_pretrained"):
                return folder.parent
            with Processes(self.accelerator).failing_together():
                if self.accelerator.is_main_process:
                    save_result(network, folder)
                    share_weights(folder)
        return folder

    def stop(self, signum: int, step: int) -> None:
        """Saves, says how to go on, and ends the run.

        Raises:
            TrainingStopped: always.
        """
        checkpoint = self.save(step)
        if self.accelerator.is_main_process:
            self._bar.close()
            without = " instead of --overwrite_output_dir" if self.args.overwrite_output_dir else ""
            print(
                f"\nStopped by {signal.Signals(signum).name} after step {step} of {self.args.max_train_steps}, saved "
                f"as {checkpoint}. Go on with {self.args.way_to_go_on}{without}.",
                file=sys.stderr,
            )
        raise TrainingStopped(signum, step, checkpoint)

    # --------------------------------------------------------------------------------------------- log and results

    def progress(self, first_step: int) -> tqdm:
        """The progress bar, a context manager around the steps."""
        self._bar = tqdm(
            total=self.args.max_train_steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        self._step_started = time.perf_counter()
        return self._bar

    def finish_step(self, done: int, figures: StepFigures) -> None:
        """Updates averages and progress after step number `done`; sometimes writes a row of the log.

        Raises:
            TooManySkipped: if too many images could not be used so far; the state is saved as a checkpoint.
        """
        if self.averages is not None:
            self.averages.update(done)
        self._recent.append((figures.loss, figures.psnr))
        self._recent_seconds += time.perf_counter() - self._step_started
        if self.args.is_due(_LOG_EVERY_STEPS, done):
            self._log(done)
        self._bar.update()
        self.position = figures.position
        self._skipped.add(figures.skipped, done)
        try:
            self._skipped.check(done * self._identity.global_batch_size)
        except TooManySkipped:
            self.save(done)
            raise
        self._step_started = time.perf_counter()

    def _log(self, done: int) -> None:
        """Shows and writes the means over the steps since the last time."""
        loss, psnr = (sum(column) / len(column) for column in zip(*self._recent, strict=True))
        speed = len(self._recent) * self._identity.global_batch_size / max(self._recent_seconds, 1e-9)
        self._recent.clear()
        self._recent_seconds = 0.0
        self._bar.set_postfix_str(f"loss {loss:.4f}, {psnr:.2f} dB, {speed:.3g} patches/s", refresh=False)
        if self.accelerator.is_main_process:
            rate = self.args.learning_rate_at(done - 1)
            figures = {"loss": loss, "psnr": psnr, "learning_rate": rate, "patches_per_second": round(speed, 2)}
            append_row(self.output_dir / _LOG_FILE, {"step": done, **figures, "seconds": round(self.seconds, 2)})
            log_figures(self.accelerator, "training", figures, done)

    def validate(self, pairs: PairSource, done: int) -> None:
        """Evaluates the weights that are the result if the run ends here, and keeps them if none were better."""
        with self._result_weights():
            network = self.network.get(self.model)
            figures = validate(network, pairs, self.output_dir, done, self.accelerator)
            if self.accelerator.is_main_process:
                self._bar.write(line_of(figures, done))
            if self.best is not None and (note := self.best.keep(network, figures, done)):
                self._bar.write(note)
        self._step_started = time.perf_counter()  # the throughput is that of training

    def _result_weights(self) -> Any:
        return nullcontext() if self.averages is None else self.averages.applied()

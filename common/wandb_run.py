"""Logging to Weights & Biases (--wandb). Nothing here imports wandb unless it is set."""

import io
import json
import secrets
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path

from common.config import UserError, first_line, to_plain
from common.disk import write_text

FLUSH_SECONDS = 2  # between writes of wandb's log to the disk; by default, a kill loses 15 s


def check_wandb(cfg) -> None:
    """Raises UserError if cfg.wandb is set, but Weights & Biases cannot be used."""
    if not cfg.wandb:
        return
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled"):
        return
    reason = "there is no API key"
    try:
        with redirect_stderr(io.StringIO()):  # wandb prints lines of its own
            if wandb.login(prompt=False):
                return
    except Exception as error:  # wandb raises many exception types
        reason = first_line(error)
    raise UserError(
        f"--wandb is set, but {reason}; run `wandb login`, set WANDB_API_KEY, or set "
        "WANDB_MODE=offline to log to the run folder"
    )


class WandbRun:
    """The Weights & Biases run of a run folder, the same one after --resume.

    W&B has one row per step and drops a row whose step is not above that of the row before. So the
    values of a step are collected and sent once they are complete: with the evaluation of that
    step, or when the next step comes. After --resume, the steps that W&B has are not sent again:
    online, those that its server has; offline, those up to the step in wandb.json, which are on the
    disk. After a kill, the disk may hold a few seconds more, which are then sent twice.

    An error of wandb does not stop training: it is printed, and nothing more is sent until the run
    is resumed.
    """

    def __init__(self, run: Path, cfg):
        """Raises UserError."""
        import wandb

        self.step, self.values = 0, {}
        self.path = path = run / "wandb.json"
        saved = {"id": secrets.token_hex(4), "step": 0}
        try:
            if path.exists():
                saved = json.loads(path.read_text())
            self.id, self.sent = saved["id"], saved["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged; delete it to log to a new W&B run") from error
        try:
            self.run = wandb.init(
                project="blueberry",
                name=cfg.run,
                id=self.id,
                resume="allow",
                dir=run.resolve(),  # the wandb service has its own working directory
                config=to_plain(cfg),
                settings=wandb.Settings(x_transaction_log_flush_interval=FLUSH_SECONDS),
            )
        except Exception as error:  # wandb raises many exception types
            raise UserError(
                f"--wandb failed: {first_line(error)}; check the network and the key, or set "
                "WANDB_MODE=offline"
            ) from error
        if not self.run.offline:
            self.sent = self.run.starting_step - 1
        self.flushing, self.flushed_at = self.sent, time.monotonic()
        self.write_progress(self.sent)

    def write_progress(self, step: int) -> None:
        """Store the last step that is certain to be in wandb's log on the disk."""
        write_text(self.path, json.dumps({"id": self.id, "step": step}))

    def add(self, step: int, values: dict) -> None:
        """Add values to a step, which is not below that of the last call."""
        self.attempt(lambda: self.collect(step, values))

    def add_table(self, step: int, columns: list[str], rows: list[list]) -> None:
        """Add text samples to a step."""
        from wandb import Table

        self.attempt(lambda: self.collect(step, {"samples": Table(columns, data=rows)}))

    def add_image(self, step: int, path: Path, caption: str) -> None:
        """Add an image file to a step."""
        from wandb import Image

        self.attempt(lambda: self.collect(step, {"samples": Image(str(path), caption=caption)}))

    def collect(self, step: int, values: dict) -> None:
        if step != self.step:
            self.send()
        self.step, self.values = step, self.values | values
        if "val_loss" in values:  # an evaluation comes last in a step
            self.send()

    def send(self) -> None:
        if self.values and self.step > self.sent:
            self.run.log(self.values, step=self.step, commit=True)
            self.sent = self.step
            if time.monotonic() > self.flushed_at + 2 * FLUSH_SECONDS:
                self.write_progress(self.flushing)
                self.flushing, self.flushed_at = self.sent, time.monotonic()
        self.values = {}

    def finish(self, summary: dict | None = None) -> None:
        """End the run: as failed, or with its summary if there is one."""
        if summary:
            self.attempt(self.send)
            self.attempt(lambda: self.run.summary.update(summary))
        self.attempt(lambda: self.run.finish(exit_code=0 if summary else 1))
        self.attempt(lambda: self.write_progress(self.sent))

    def attempt(self, call: Callable[[], None]) -> None:
        """Call what uses wandb; after an error, report it and make no more calls."""
        if self.run is None:
            return
        try:
            call()
        except Exception as error:  # wandb raises many exception types
            self.run = None
            print(
                f"warning: wandb failed ({first_line(error)}); training continues without it "
                "until the run is resumed",
                flush=True,
            )
            with suppress(Exception):  # or it prints errors of its own until the end
                import wandb

                wandb.teardown()

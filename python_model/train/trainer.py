"""The training loop: plan the step, accumulate its gradients, update, log, save; resumable at every step."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from python_model.data.stream import StepSamples, check_data, open_stream
from python_model.model.card import CARD_FILE, model_card
from python_model.model.limits import warn_beyond_positions
from python_model.model.modeling import GritLM
from python_model.support.files import check_writable, new_folder, write_json
from python_model.support.precision import computes_in_bfloat16
from python_model.train.adapters import merge_adapters
from python_model.train.balance import cosine, total_norm
from python_model.train.checkpointer import Checkpointer
from python_model.train.config import ModelConfig, TrainConfig
from python_model.train.distributed import Ranks, wrap
from python_model.train.flops import ModelFlops, measured_peak
from python_model.train.memory import device_limit, plan_memory, plan_tokens, used_gib
from python_model.train.model import TrainingModel
from python_model.train.optimizers import Optimizers, require_8_bits
from python_model.train.profiling import step_profiler
from python_model.train.setup import (
    check_batch_size,
    check_matryoshka_dims,
    compile_layers,
    load_model,
    recompute_activations,
    router_loss_weight,
    run_identity,
)
from python_model.train.step import RankBatch, StepGradients, StepLosses, plan_step
from python_model.train.trackers import StepLog, Tracker, open_trackers
from python_model.train.validation import Validation, best_scores, check_evaluation

WINDOW = 50
"""Number of previous steps that a loss is compared with."""


class Stream(Protocol):
    """Provides the samples of any step."""

    def steps(self, start: int, stop: int) -> Iterator[StepSamples]:
        """The samples of steps ``start`` .. ``stop - 1``."""
        ...


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and saved its state."""


class Trainer:
    """Trains ``model`` on a stream of samples; see :class:`TrainConfig`. The same seed, data and machine give the same run.

    With several ranks, each receives its own share of every step (``Ranks.share``).
    """

    def __init__(self, model: GritLM, config: TrainConfig, stream: Stream, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks(0, 1, model.device)
        config = replace(config, model=_with_precision(config.model, self.ranks))
        self.grit, self.config, self.stream = model, config, stream
        losses = config.losses
        check_batch_size(config.batch, self.ranks.world, config.mode)
        check_matryoshka_dims(model, losses)
        recompute_activations(model, config.model)
        router = router_loss_weight(model, losses)
        training_model = TrainingModel(model, router_loss=router > 0)
        training_model.touch_all = self.ranks.group is not None
        self.flops = ModelFlops.of(model)
        self._datasets = list(getattr(stream, "datasets", ()))
        self._texts = self._texts_cut = 0
        self.memory = plan_memory(
            training_model,
            model.model.config,
            plan_tokens(config.mode, config.data, config.batch, self.ranks.world),
            config.model,
            config.parallel,
            config.mode,
            self.ranks.world,
            config.optimizer.kind,
        )
        identity = run_identity(
            model,
            getattr(stream, "digest", ""),
            self.ranks,
            evaluation_data=config.evaluation.data,
            optimizer=config.optimizer.kind,
            parallel=config.parallel,
            own_negatives=config.embeds and losses.in_batch_negatives and not losses.cross_device_negatives,
        )
        compile_layers(model, config.model)
        bf16 = bool(config.model.bf16)
        self.model = wrap(training_model, config.parallel, self.ranks, bf16=bf16)
        self.optimizers = Optimizers(
            self.model, config.optimizer, losses, self.ranks, steps=config.steps, embeds=config.embeds
        )
        self.gradients = StepGradients(
            self.model,
            losses,
            self.ranks,
            bf16=bf16,
            normalized=model.settings.normalized,
            objective_grad_norm=config.optimizer.objective_grad_norm,
            reduce_each_chunk=config.parallel.reduce_each_chunk,
            log_temperature=self.optimizers.log_temperature,
            router_loss_weight=router,
        )
        self.folder = Path(config.output_dir)
        # settings from the checkpoint are part of the run's identity
        self.settings = {**config.to_dict(), "grit": asdict(model.settings)}
        self.checkpointer = Checkpointer(
            self.folder / "states", self.settings, self.ranks, identity=identity, save_total=config.logging.save_total
        )
        self._best = Checkpointer(self.folder / "best", self.settings, self.ranks, save_total=1)
        self.after_step: Callable[[int], None] | None = None
        """Called with the number of steps done, before the state is saved; may evaluate the model."""
        self._stop = False
        self._executed = 0

    @classmethod
    def from_config(cls, config: TrainConfig, ranks: Ranks) -> Trainer:
        """The trainer of a run, with the model and the data that ``config`` names."""
        # with FSDP only rank 0 reads the weights, into CPU memory, as no device need hold them all; the others get their shards
        sharded = ranks.group is not None and config.parallel.strategy == "fsdp"
        device = torch.device("cpu") if sharded else ranks.device
        # before minutes are spent on loading a model
        if sharded and config.model.quantization:
            raise ValueError(
                f"model.quantization: expected '' with parallel.strategy fsdp, which does not shard weights of 4 bits, got "
                f"{config.model.quantization!r}; parallel.strategy=ddp gives each rank a copy"
            )
        if config.optimizer.kind == "adamw_8bit":
            require_8_bits()
        losses = config.losses
        needed = {"in_batch_negatives": losses.in_batch_negatives, "teacher": losses.distillation_weight > 0}
        for note in check_data(config.data, config.mode, batch=config.batch, **needed):
            if ranks.first:
                print(f"note: {note}", flush=True)
        if config.evaluation.data:
            check_evaluation(config.evaluation, config.mode)
        if ranks.first:
            check_writable(Path(config.output_dir))
        model = load_model(
            config.model,
            device,
            mode=config.mode,
            settings=config.settings_given,
            seed=config.seed,
            weights=ranks.first or not sharded,
        )
        stream = open_stream(
            config.data,
            config.batch,
            model.tokenizer,
            settings=model.settings,
            mode=config.mode,
            **needed,
            seed=config.seed,
            rank=ranks.rank,
            world=ranks.world,
        )
        return cls(model, config, stream, ranks)

    def step(self, samples: StepSamples, index: int) -> dict[str, Any]:
        """One optimiser step on this rank's samples; returns what the log records."""
        read = (*samples.queries, *samples.passages, *samples.conversations)
        self._texts, self._texts_cut = self._texts + len(read), self._texts_cut + sum(s.truncated for s in read)
        if self.ranks.first:
            warn_beyond_positions(self.grit, map(len, read))
        batch = plan_step(
            samples.queries,
            samples.passages,
            samples.conversations,
            (samples.query_ids, samples.passage_ids) if self.config.losses.mask_duplicates else None,
            self.config.batch,
            self.config.losses,
            self.ranks,
            attention=self.grit.attention,
            scores=samples.passage_scores,
            datasets=(samples.query_datasets, samples.conversation_datasets) if self._datasets else None,
            num_datasets=len(self._datasets),
        )
        losses = self.gradients(batch, self.config.seed * 2**20 + index)
        if not math.isfinite(losses.total):
            self._stop_at_bad_batch(batch, samples, losses, "it is not finite")
        temperature = self.optimizers.temperature
        norm = self.optimizers.clip()
        if not math.isfinite(norm):  # before it reaches the weights and a saved state
            self._stop_at_bad_batch(batch, samples, losses, f"its gradient has norm {norm}")
        self._executed += 1
        if self._executed == 2:  # in the first step, one half of each adapter has none yet
            self._report_unreached(index)
        self.optimizers.update(index)
        return {
            "loss": losses.total,
            "contrastive_loss": losses.contrastive,
            "generative_loss": losses.generative,
            **({} if losses.distillation is None else {"distillation_loss": losses.distillation}),
            **({} if losses.router is None else {"router_loss": losses.router}),
            **self._by_dataset(losses),
            **({"temperature": temperature} if self.optimizers.log_temperature is not None else {}),
            "gradient_norm": norm,
            "contrastive_grad_norm": losses.contrastive_grad_norm,
            "generative_grad_norm": losses.generative_grad_norm,
            "gradient_cosine": cosine(losses.added_norms, norm),
            "lr": self.optimizers.lr(index),
            "tokens": batch.tokens,
            "chunks": batch.num_chunks,
            # per rank; divided by the step's seconds, the rate of a device
            "tflop": self.flops.step(batch.tokens, batch.labels, batch.pairs) / self.ranks.world / 1e12,
        }

    def _by_dataset(self, losses: StepLosses) -> dict[str, float]:
        """The mean loss of each data set's queries and reply tokens in the step."""
        if len(self._datasets) == 1:
            return {}
        kinds = (("contrastive", losses.contrastive_by_dataset), ("generative", losses.generative_by_dataset))
        return {
            f"{kind}_loss/{name}": loss
            for kind, by_dataset in kinds
            for name, loss in zip(self._datasets, by_dataset, strict=True)
            if loss is not None
        }

    def train(self) -> list[dict[str, Any]]:
        """Run the remaining steps, with a progress bar; returns the records of ``output_dir/log.jsonl``.

        Raises:
            FloatingPointError: the loss or its gradient is not finite, or the loss exploded; ``bad_batch.json`` holds the
                step's samples.
            Interrupted: after SIGTERM or SIGINT, once the state is saved.
        """
        start = self._resume()
        config = self.config.logging
        peak = config.peak_tflops
        if not peak:
            dtype = torch.bfloat16 if self.config.model.bf16 else torch.float32
            peak = measured_peak(self.ranks.device, dtype) / 1e12
        if self.ranks.first:
            write_json(self.folder / "config.json", self.settings)
            for line in self.memory.lines(device_limit(self.ranks.device)):
                tqdm.write(line)
        # trackers first, as they may be missing: a new log drops what an earlier run wrote
        others = open_trackers(config.trackers, self.folder, self.settings) if self.ranks.first else []
        log = StepLog(self.folder / "log.jsonl", start) if self.ranks.first else None
        trackers: list[Tracker] = [log, *others] if log else []
        recent = self._earlier_losses(log)
        validation = self._validation(start)
        stop = start if validation is not None and validation.enough() else self.config.steps
        self.model.train()
        bar = tqdm(total=self.config.steps, initial=start, desc="train", unit="step", disable=not self.ranks.first)
        torch.use_deterministic_algorithms(self.config.deterministic)
        try:
            with bar, self._stoppable(), step_profiler(self.folder, config.profile_steps, self.ranks) as profile_step:
                begin = time.perf_counter()
                for index, samples in enumerate(self.stream.steps(start, stop), start):
                    record = self.step(samples, index)
                    seconds = time.perf_counter() - begin
                    tflops = record.pop("tflop") / seconds
                    record |= {
                        "seconds": seconds,
                        "tokens_per_second": record["tokens"] / seconds,
                        "tflops": tflops,
                        "mfu": tflops / peak,
                        "memory_gib": used_gib(self.ranks.device),
                    }
                    for tracker in trackers:
                        tracker.log(index + 1, record)
                    _show(bar, record)
                    recent = self._check_explosion([*recent, record["loss"]][-WINDOW - 1 :], samples)
                    if self.after_step is not None:
                        self.after_step(index + 1)
                        self.model.train()
                    enough = validation is not None and validation(index + 1, self.config.steps)
                    self.model.train()
                    profile_step()
                    self._save_state(index + 1)
                    if validation is not None and enough:
                        bar.write(f"stopping after step {index + 1}: no improvement since step {validation.best()}")
                        break
                    begin = time.perf_counter()
        except Exception as error:
            # a state still being written counts; of errors on one rank alone the others know nothing, and would not take part
            if self.ranks.world == 1 or isinstance(error, FloatingPointError):
                self.checkpointer.finish()
            raise
        finally:
            torch.use_deterministic_algorithms(False)
            for tracker in trackers:
                tracker.close()
            if validation is not None:
                validation.close()
        if self.ranks.first and self._texts_cut:
            limits = "data.query_max_len, passage_max_len or generative_max_len"
            tqdm.write(f"{self._texts_cut} of {self._texts} texts were longer than {limits}; what follows was not read")
        self.checkpointer.finish()
        best = self._best.shared_latest() if validation is not None else None
        if best is not None:
            self._best.load(best, self.optimizers.weights)
        self.model.eval()
        return log.records if log else []

    def save(self) -> Path:
        """Write the trained model to ``output_dir/checkpoint``, atomically: a plain transformers checkpoint
        (adapters merged) with the tokenizer and the GRIT settings. Returns the folder; every rank must call it."""
        target = self.folder / "checkpoint"
        grit = self._whole_model()
        if self.ranks.first:
            assert grit is not None
            merge_adapters(grit)
            with new_folder(target) as folder:
                grit.save_pretrained(folder)
                (folder / CARD_FILE).write_text(self._card(grit), encoding="utf-8")
        self.ranks.barrier()
        return target

    def _card(self, grit: GritLM) -> str:
        report = getattr(self.stream, "report", None)
        scores = self.folder / "evaluation.jsonl"
        evaluation = self.config.evaluation
        # without an evaluation, the file is an earlier run's
        results = best_scores(scores, evaluation.metric) if evaluation.data and scores.is_file() else None
        return model_card(
            grit.settings,
            kind="embedding" if self.config.mode == "embedding" else "grit",
            name=self.config.push_to_hub or self.folder.name,
            base=self.config.model.name,
            training=self.config.card_settings(),
            datasets=None if report is None else report.used,
            results=results,
        )

    def _whole_model(self) -> GritLM | None:
        """The model with unsharded weights on rank 0 (None on the others)."""
        if not hasattr(self.model, "set_requires_gradient_sync"):
            return self.grit
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)
        if not self.ranks.first:
            return None
        config = self.config
        settings = {name: value for name, value in asdict(self.grit.settings).items() if value is not None}
        # a model without weights adopts the gathered ones, so there is never a second copy
        fresh = TrainingModel(
            load_model(config.model, torch.device("cpu"), mode=config.mode, settings=settings, weights=False)
        )
        fresh.load_state_dict(weights, assign=True)
        fresh.grit.model.tie_weights()
        return fresh.grit

    def _resume(self) -> int:
        state = self.checkpointer.shared_latest() if self.config.logging.resume else None
        if state is None:
            return 0
        done = self.checkpointer.load(state, self.optimizers)
        if self.ranks.first:
            tqdm.write(f"resuming after step {done} ({state})")
        return done

    def _earlier_losses(self, log: StepLog | None) -> list[float]:
        """The losses of the last steps that the log, which only the first rank has, holds: the same on all ranks."""
        found = [float(record["loss"]) for record in log.records[-WINDOW:]] if log else []
        count = int(self.ranks.all_values([len(found)])[0, 0])
        shared: list[float] = self.ranks.all_values([*found, *[0.0] * (WINDOW - len(found))])[0, :count].tolist()
        return shared

    def _validation(self, start: int) -> Validation | None:
        config = self.config.evaluation
        if not config.data:
            return None
        return Validation(
            config,
            self.model,
            self.grit,
            self.optimizers.weights,
            self.folder,
            self._best,
            self.ranks,
            bf16=bool(self.config.model.bf16),
            start=start,
        )

    def _save_state(self, done: int) -> None:
        stops, written = self.ranks.all_values([self._stop, self.checkpointer.written()]).bool().T
        stop = bool(stops.any())
        if written.all():  # what dies before the next save must not take this state with it
            self.checkpointer.finish()
        due = self.config.logging.save_steps and (
            done % self.config.logging.save_steps == 0 or done == self.config.steps
        )
        if due or (stop and done < self.config.steps):
            wait = stop or not self.config.logging.async_save
            saved = self.checkpointer.save(done, self.optimizers, wait=wait)
            if stop and done < self.config.steps:
                raise Interrupted(f"stopped after step {done}; the same command continues from {saved}")

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """SIGTERM and SIGINT request a stop after the current step; a second one has its usual effect."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop = True
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _check_explosion(self, losses: list[float], samples: StepSamples) -> list[float]:
        limit = self.config.logging.exploding_loss
        if limit and len(losses) > 5 and losses[-1] > statistics.fmean(losses[:-1]) + limit:
            mean = statistics.fmean(losses[:-1])
            raise FloatingPointError(
                f"loss: got {losses[-1]:.4g}, which is more than logging.exploding_loss={limit} above the mean of the last "
                f"{len(losses) - 1} steps ({mean:.4g}); its samples are in {self._save_bad_batch(samples)}"
            )
        return losses

    def _stop_at_bad_batch(self, batch: RankBatch, samples: StepSamples, losses: StepLosses, why: str) -> None:
        raise FloatingPointError(
            f"loss: got {losses.total} (contrastive {losses.contrastive}, generative {losses.generative}), {why}; "
            f"the samples of rank {self.ranks.rank} ({batch.num_chunks} chunks) are in {self._save_bad_batch(samples)}"
        )

    def _report_unreached(self, index: int) -> None:
        """Report trained weights that the step's gradient does not reach: they remain unchanged."""
        names = [
            name.removeprefix("module.grit.").removeprefix("grit.")
            for name, p in self.model.named_parameters()
            if p.requires_grad and (p.grad is None or total_norm([p.grad]) == 0.0)
        ]
        if names and self.ranks.first:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            tqdm.write(f"no gradient reached {len(names)} trained weight(s) in step {index + 1}: {shown}")

    def _save_bad_batch(self, samples: StepSamples) -> Path:
        name = "bad_batch.json" if self.ranks.world == 1 else f"bad_batch.rank{self.ranks.rank}.json"
        file = self.folder / name
        write_json(
            file,
            {
                kind: [{"input_ids": s.input_ids, "instruction_len": s.instruction_len} for s in chosen]
                for kind, chosen in (
                    ("queries", samples.queries),
                    ("passages", samples.passages),
                    ("conversations", samples.conversations),
                )
            }
            | {"query_origins": samples.query_origins, "conversation_origins": samples.conversation_origins},
        )
        return file


def _with_precision(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """The settings with ``bf16`` decided, as states and resuming need it."""
    if config.bf16 is not None:
        return config
    bf16 = computes_in_bfloat16(None, ranks.device)
    if ranks.first and not bf16:
        tqdm.write(
            "note: computing in float32, as this CPU emulates products in bfloat16; model.bf16=true computes in bfloat16"
        )
    return replace(config, bf16=bf16)


def _show(bar: Any, record: dict[str, Any]) -> None:
    shown = {
        "rep": record["contrastive_loss"],
        "gen": record["generative_loss"],
        "lr": record["lr"],
        "tok/s": record["tokens_per_second"],
        "GiB": record["memory_gib"],
    }
    bar.set_postfix({key: f"{value:.3g}" for key, value in shown.items() if value is not None})
    bar.update()

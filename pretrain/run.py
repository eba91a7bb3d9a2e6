"""One run on one rank, from the checks before it to its exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipelines.children.nursery import nursery
from data_pipelines.cores import cores_per_process
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.files import read_json
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.backends.any_channels import left_out_line
from pretrain.checkpoints.folder import CheckpointFolder, damage, read_state
from pretrain.checkpoints.saving import NotSavedError
from pretrain.config import Config
from pretrain.config.auto_hparams import resolve_auto
from pretrain.config.load import check_batch, check_sources
from pretrain.diagnostics import TroubleError, named_data
from pretrain.encoders.supported import check_encoder
from pretrain.engines.engine import choose_device, import_deepspeed, initialise_distributed
from pretrain.engines.precision import slow_precision
from pretrain.engines.schedules import Timeline, check_warmup
from pretrain.interop.initialise import check_init_from
from pretrain.methods.registry import spec_of
from pretrain.start_checks import check_machine, check_profile
from pretrain.stream.datasets import data_lines, sampler_of, training_datasets
from pretrain.stream.growth import continued
from pretrain.stream.loading import resolve_backend
from pretrain.stream.normalisation import choose_normalisation, keep_normalisation, resolve_normalisation
from pretrain.survival.failures import noted
from pretrain.survival.history import recorded_end
from pretrain.survival.nccl import dump_flight_recorder, set_defaults
from pretrain.survival.parent import end_with_parent
from pretrain.survival.rank_log import write_apart
from pretrain.survival.run_folder import alone_in, begun_config, check_run_folder, write_config
from pretrain.survival.startup import StartUp
from pretrain.survival.stopping import EXIT_NOT_SAVED, EXIT_STOPPED, EXIT_TROUBLE, StopRequest
from pretrain.survival.watchdog import STACKS, Limits, Watchdog
from pretrain.tracking.log_file import logged
from pretrain.train import Trainer


def pretrain(
    config: Config,
    stop: StopRequest | None = None,
    startup: StartUp | None = None,
    datasets: Sequence[Dataset] | None = None,
) -> Path:
    """Train what `config` says, continuing from the last checkpoint if there is one. Returns the run folder.

    Run by every rank of a distributed job, or by one process. Raises ConfigError before anything is started or
    written when it can't run; ends with exit code 85 when a signal asked it to stop after a checkpoint, and with 87
    when training went wrong. `stop` is the request that the caller has installed already, before its slow imports,
    `startup` the clock that it started, and `datasets` what it has opened of `config.data` by then.
    """
    stop = stop or StopRequest.install()  # before the slow part, so that an early signal does not kill us
    end_with_parent(os.environ)
    startup = startup or StartUp(age=0.0)
    device = choose_device(config)
    check_batch(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_encoder(config)
    startup.mark("encoder check")
    datasets = datasets or training_datasets(config)
    config, chosen = resolve(config, datasets)
    chosen += [line for line in [slow_precision(config.engine, device)] if line]
    folder = check_run_folder(config)
    normalisation = choose_normalisation(config, datasets)
    sampler = sampler_of(config, datasets)
    timeline = Timeline.of(config.train, sampler.steps_per_epoch)
    check_warmup(config.optim, timeline)  # before anything is written
    check_profile(config, timeline.total_steps)
    check_machine(config, device)
    # of many ranks, some might not see the files of the others' last start yet: those go the long way, together
    if os.environ.get("WORLD_SIZE", "1") == "1" and is_finished(folder, config, sampler):
        check_its_data(folder, config, sampler)
        what = spec_of(config.method).exports
        print(f"{folder} is finished; its {what} is in {folder / what}. To train longer, take another name=...")
        return folder
    check_sources(config)
    if os.environ.get("RANK", "0") == "0":  # of the others, those that don't see the files say so together, later
        named_data(config)
    if not CheckpointFolder(folder, config.checkpoint).all():  # a run that has begun needs init_from no more
        check_init_from(config)
    torch.set_num_threads(config.engine.threads or cores_per_process())
    startup.mark("data")

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    limits, about = Limits.of(config.engine, world_size), dict[str, Any](step=0)
    with ExitStack() as held:
        held.enter_context(noted(folder, rank, about))
        write_apart(folder, rank, world_size)
        if rank == 0:
            held.enter_context(alone_in(folder))
            held.enter_context(logged(folder))
            held.enter_context(recorded_end(folder, about))
        watchdog = held.enter_context(Watchdog(limits, folder, rank, world_size, dump_flight_recorder))
        if device.type == "cuda":
            set_defaults(folder / STACKS)
        if config.data.workers:
            nursery()  # it imports what it needs while this process does
        import_deepspeed(device)
        startup.mark("import deepspeed")
        rank, world_size = initialise_distributed(device)
        startup.mark("process group")
        if rank == 0:
            write_config(folder, config)
            print("\n".join(chosen), end="\n" if chosen else "", flush=True)
        trainer = Trainer(config, folder, sampler, normalisation, device, rank, world_size, startup)
        code = EXIT_STOPPED
        try:
            trainer.train(stop, watchdog)
        except TroubleError as trouble:  # on all ranks alike
            code = EXIT_TROUBLE
            about["reason"] = trouble.reason
            if rank == 0:
                print(f"error: {trouble}", file=sys.stderr, flush=True)
        except NotSavedError as error:  # on all ranks alike
            code = EXIT_NOT_SAVED
            about["reason"] = str(error)
            trainer.say(f"stopped after step {trainer.step}: {error}")
        finally:
            about["step"] = trainer.step
            with watchdog.allowing("end"):
                trainer.close()
        with watchdog.allowing("end"):
            dist.barrier()  # a launcher takes the first rank that ends with 85 for a failure and kills the others
        if code == EXIT_NOT_SAVED or trainer.step < trainer.timeline.total_steps:
            if code == EXIT_STOPPED:
                about["reason"] = f"stopped by {stop.by}" if stop.by else "stopped: another rank was asked to"
            sys.exit(code)
    return folder


def resolve(config: Config, datasets: Sequence[Dataset]) -> tuple[Config, list[str]]:
    """The configuration with what it leaves open decided, as when the run began, and a line for each decision."""
    num_samples = sum(dataset.num_samples for dataset in datasets)
    config, chosen = resolve_auto(config, num_samples, begun_config(config))
    config, known = resolve_normalisation(config)
    chosen += known + left_out_line(config.views, config.data.channels) + data_lines(config, datasets)
    return keep_normalisation(resolve_backend(config), datasets), chosen


def check_its_data(folder: Path, config: Config, sampler: Sampler) -> None:
    """Raise ConfigError where a finished run was shown other data than those given: it would learn nothing of them."""
    for path in CheckpointFolder(folder, config.checkpoint).all()[-1:]:
        if damage(path) is None:
            saved = read_state(path)
            continued(saved.order, sampler, saved.step, folder, config.data.adopt == "next_epoch")


def is_finished(folder: Path, config: Config, sampler: Sampler) -> bool:
    """Whether the run has published the encoder, or tokenizer, of its last step."""
    card = read_json(folder / spec_of(config.method).exports / "config.json")
    if card is None:
        return False
    for path in CheckpointFolder(folder, config.checkpoint).all()[-1:]:  # of data that grew, the first number counts
        if damage(path) is None:
            sampler = Sampler.continued(read_state(path).order, {})
    return card["step"] >= Timeline.of(config.train, sampler.steps_per_epoch).total_steps

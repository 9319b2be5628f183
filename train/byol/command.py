"""``mammostream pretrain``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mammostream.common.options import Command, config_file_option, config_options, resolved
from mammostream.train.byol.config import PretrainConfig

FILE = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--shards", "shards_dir", type=FILE, required=True, help="Shard directory; its split 'train' is used.")
@click.option("--output-dir", type=FILE, required=True, help="The run's folder: checkpoints, metrics.jsonl, pictures.")
@click.option("--resume", help="auto = resume from the run's last checkpoint if there is one; or a checkpoint's path.")
@config_options(PretrainConfig)
@config_file_option
@click.pass_context
def pretrain(ctx: click.Context, /, shards_dir: Path, output_dir: Path, resume: str | None, **options: Any) -> None:
    """Pre-train a backbone by BYOL: two views of each tile, no labels.

    Writes mammogram_byol_last.pth after each epoch, _best, _epoch_010 and so on, and _final; metrics.jsonl with loss, z_std,
    feature spread, effective rank, view retrieval and more; views.png and curves.png. A collapse triggers a warning with its
    evidence. The best epoch is that of the highest online probe where it runs, else of the lowest loss without a collapse
    alarm. SIGTERM, SIGUSR1 and Ctrl-C save after the current step; the exit code is then 75 (Ctrl-C: 130), and --resume auto
    continues as if nothing had happened (with more or fewer processes, from the start of an epoch only). Several
    processes: torchrun --standalone --nproc-per-node N -m mammostream pretrain ...
    """
    from mammostream.shards.reading import open_shards

    config = PretrainConfig(**options)
    shards = open_shards(shards_dir)
    shards.shards("train")
    from mammostream.train.byol.pretrain import pretrain as run
    from mammostream.train.byol.run import CHECKPOINT_NAME
    from mammostream.train.run.resuming import find_resume
    from mammostream.train.run.runtime import join_processes

    checkpoint = find_resume(resume, output_dir / CHECKPOINT_NAME.format("last"))
    with join_processes(config) as runtime:
        metrics = run(shards, output_dir, config, checkpoint, resolved(ctx), runtime)
        if runtime.is_main:
            click.echo(
                f"loss {metrics['loss']:.4f}, z_std {metrics['z_std']:.4f}, {metrics['pairs_per_second']:.1f} pairs/s, "
                f"data wait {metrics['data_wait_percent']:.1f} %"
            )
            click.echo(f"checkpoints -> {output_dir}")

"""What an earlier run left in a study's folder is checked before any of it is used."""

import os
import warnings

from mechvlm.errors import InputError
from mechvlm.study.running.atomic import damage, read_about, remove
from mechvlm.study.running.plan import Plan


def check_shards(plan: Plan) -> None:
    """Delete damaged shards, after a warning that names them: they are made again.

    Galleries are deleted too. Their pages run scripts, so no page is kept that this run has not
    made itself.

    Raises:
        InputError: for a shard of other settings, examples or place than the plan's. Nothing is
            deleted then.
    """
    damaged = {}
    for model in range(len(plan.names)):
        for number in (*range(len(plan)), *plan.pair_shards):
            folder = plan.shard_folder(model, number)
            if not os.path.lexists(folder):
                continue
            if folder.is_symlink() or not folder.is_dir():
                damaged[folder] = f"{folder} is no folder"
            elif (reason := damage(folder)) is not None:
                damaged[folder] = reason.partition(". Give the same command")[0]
            else:
                about = read_about(folder)
                identity = plan.shard_identity(model, number)
                if differ := [key for key, value in identity.items() if about[key] != value]:
                    raise InputError(
                        f"{folder} is of another study: its {' and '.join(differ)} are not those of this one. Move it out of "
                        f"{plan.folder} and give the same command again: that part is then made here."
                    )
    for folder, reason in damaged.items():
        warnings.warn(f"{reason}. This part of the study is made again.", stacklevel=3)
        remove(folder)
    for model in range(len(plan.names)):
        remove(plan.gallery_folder(model))

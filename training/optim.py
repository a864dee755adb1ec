"""Optimizers, learning-rate schedules and parameter groups, by their transformers names."""

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from common.problems import UserError
from training.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import TrainingArguments

METRIC_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")


def optimizer_class(config: TrainConfig) -> "tuple[type[torch.optim.Optimizer], dict[str, Any]]":
    """(class, keyword arguments) for --optimizer, as resolved by transformers' Trainer. UserError if it cannot."""
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    names = [item.value for item in OptimizerNames]
    if config.optimizer not in names:
        raise UserError(f"--optimizer {config.optimizer}: unknown; transformers knows {', '.join(names)}")
    if config.optimizer.startswith(("lomo", "adalomo", "schedule_free", "galore", "apollo")):
        raise UserError(
            f"--optimizer {config.optimizer}: replaces the training loop or averages weights; not supported"
        )
    wanted = SimpleNamespace(
        optim=OptimizerNames(config.optimizer),
        learning_rate=config.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        optim_args=None,
        optim_target_modules=None,
    )
    try:
        return Trainer.get_optimizer_cls_and_kwargs(cast("TrainingArguments", wanted))
    except (ImportError, ValueError) as error:
        raise UserError(f"--optimizer {config.optimizer}: {str(error).splitlines()[0]}") from None


def make_scheduler(config: TrainConfig, optimizer: "torch.optim.Optimizer", total: int) -> "LRScheduler":
    """The learning-rate schedule of --scheduler over `total` optimizer steps. ValueError or TypeError from transformers
    if --scheduler_kwargs do not fit it."""
    from transformers import get_scheduler

    extra = json.loads(config.scheduler_kwargs)
    made = get_scheduler(config.scheduler, optimizer, config.warmup_steps, total, scheduler_specific_kwargs=extra)
    return cast("LRScheduler", made)


def check_scheduler(config: TrainConfig, total: int) -> None:
    """UserError unless --scheduler is known to transformers and works with the other arguments."""
    import torch
    from transformers import SchedulerType

    names = [item.value for item in SchedulerType]
    if config.scheduler not in names:
        raise UserError(f"--scheduler {config.scheduler}: unknown; transformers knows {', '.join(names)}")
    try:
        if not isinstance(json.loads(config.scheduler_kwargs), dict):
            raise UserError(f"--scheduler_kwargs {config.scheduler_kwargs}: must be a JSON object")
        make_scheduler(config, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate), total)
    except json.JSONDecodeError as error:
        raise UserError(f"--scheduler_kwargs {config.scheduler_kwargs}: not JSON ({error})") from None
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--scheduler {config.scheduler}: {str(error).splitlines()[0]} (see --scheduler_kwargs)"
        ) from None
    if config.scheduler in METRIC_SCHEDULERS and not config.eval_rows:
        raise UserError(f"--scheduler {config.scheduler}: depends on the held-out loss; set --eval_rows")


def parameter_groups(model: "torch.nn.Module", weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices; none on biases, norms and DoRA magnitudes."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

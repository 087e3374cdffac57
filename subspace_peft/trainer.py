"""SubspaceTrainer: transformers' Trainer that finds the rate of theta_d, and takes optimisers that need a closure."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from .evaluation import run
from .optim import PPlusBFGS, repeatable
from .rates import IS_FOUND, find_rates, is_like_adam, parameter_groups, set_rate
from .sensitivity import is_theta_d


def needs_closure(optimizer: Callable) -> bool:
    """Whether the step of this optimiser class needs a closure: it has `needs_closure = True`, or is torch's LBFGS."""
    is_lbfgs = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.LBFGS)
    return is_lbfgs or getattr(optimizer, "needs_closure", False)


class Update:
    """The closure of one update: it returns the loss of its micro-batches, and computes gradients if they are enabled.

    Trainer decides how losses are accumulated and divided, and evaluates the micro-batches before it calls `step`: the
    first call of the closure returns these results. The loss is the mean over the processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.model: nn.Module | None = None
        self.evaluations: list[Callable] = []
        self.results: list = []  # of Trainer's evaluations, until the first call uses them
        self.gradients: list[Tensor | None] = []

    def add(self, model: nn.Module, evaluation: Callable):
        """Add a micro-batch, and evaluate it for Trainer."""
        self.model = model
        self.evaluations.append(repeatable(evaluation, model))
        self.results.append(self.evaluations[-1]())
        self.versions = self._versions()
        return self.results[-1]

    def keep_gradients(self) -> None:
        """Keep the gradients of Trainer's evaluations, which an optimiser may clear before it calls the closure."""
        self.gradients = [p.grad for p in self._trained_parameters()]
        self.versions += [gradient._version for gradient in self.gradients if gradient is not None]

    def __call__(self):
        is_usable = self.results and self.versions == self._versions()
        results, gradients, self.results, self.gradients = self.results, self.gradients, [], []
        if not is_usable:
            del results, gradients  # free their graph before the next one is made
            results = self._evaluate()
        elif torch.is_grad_enabled():
            for parameter, gradient in zip(self._trained_parameters(), gradients, strict=True):
                parameter.grad = gradient
        if isinstance(results[0], tuple):
            return results[0]
        return self.accelerator.reduce(torch.stack(results).sum(), reduction="mean")

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _versions(self) -> list[int]:
        return [p._version for p in (*self._trained_parameters(), *self.gradients) if p is not None]

    def _evaluate(self) -> list:
        if not torch.is_grad_enabled():
            with without_backward(self.accelerator):
                return [evaluation() for evaluation in self.evaluations]
        self.model.zero_grad()
        *first, last = self.evaluations
        with self.accelerator.no_sync(self.model):
            results = [evaluation() for evaluation in first]
        return [*results, last()]


@contextlib.contextmanager
def without_backward(accelerator: Accelerator) -> Iterator[None]:
    """Turn backward off: Trainer.training_step always calls it, but trials of a line search need no gradients."""
    accelerator.backward = lambda loss, **kwargs: None
    try:
        yield
    finally:
        del accelerator.backward


class SubspaceTrainer(Trainer):
    """transformers.Trainer that finds the rates of theta_d and a head, and takes optimisers that need a closure.

    Where `learning_rate` is left at Trainer's default and the optimiser to Trainer, the rates are those of
    `parameter_groups(model, batch=..., steps=...)` for the first batch and all steps, falling by the schedule of the
    arguments, and are logged. With a learning rate, an optimiser or DeepSpeed it trains as Trainer does, bit for bit.

    Pass an optimiser that needs a closure as `optimizers=(PBFGS([theta_d]), None)`, or as
    `optimizer_cls_and_kwargs=(PBFGS, {})`, which gives it all trainable parameters in one group. An update needs no
    more evaluations than a plain loop. All evaluations of an update see the same dropout, and only the first changes
    batch-norm statistics.

    With a closure gradients are not clipped: the difference of two clipped gradients is not the curvature.

    Raises:
        ValueError: before training, if the optimiser needs a closure, for: fp16, DeepSpeed, FSDP; a `max_grad_norm`
            that is neither 0 nor the default; `weight_decay` with `optimizer_cls_and_kwargs`; gradient accumulation if
            the optimiser needs logits; checkpoints with PPlusBFGS, which trains weights that an adapter's file does
            not hold.
    """

    _update: Update | None = None
    _undo: Callable[[], None] | None = None
    _logits = False
    _due: torch.optim.Optimizer | None = None  # the first step finds its rates

    def train(self, *args, **kwargs):
        self._end()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            optimizer, settings = self.optimizer_cls_and_kwargs
            if needs_closure(optimizer):
                if self.args.weight_decay:
                    raise ValueError(
                        f"`weight_decay` must be 0 with {optimizer.__name__}, got {self.args.weight_decay}; add the "
                        "penalty to the loss instead, so that a line search sees it."
                    )
                parameters = (self.model if model is None else model).parameters()
                self.optimizer = optimizer([p for p in parameters if p.requires_grad], **settings)
        is_rate_left_out = self.args.learning_rate == TrainingArguments.learning_rate
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and is_rate_left_out:
            self._group(self.model if model is None else model)
        super().create_optimizer(model)
        optimizer = self.optimizer
        if isinstance(optimizer, AcceleratedOptimizer):  # from an earlier call of `train`
            optimizer = optimizer.optimizer
        if needs_closure(type(optimizer)) and self._undo is None:
            self._check(optimizer)
            self._begin(optimizer)
        return self.optimizer

    # ------------------------------------------------------------------------------------- the rates that are left out

    def _group(self, model: nn.Module) -> None:
        """Give theta_d and the head groups of their own, whose rates the first step corrects."""
        if not any(p.requires_grad and is_theta_d(name) for name, p in model.named_parameters()):
            return
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        if self.is_deepspeed_enabled or not is_like_adam(kind):
            why = "with DeepSpeed" if self.is_deepspeed_enabled else f"for {kind.__name__}"
            default = f"theta_d trains at Trainer's default of {self.args.learning_rate}, too low for most models"
            warnings.warn(f"No rate is found {why}: {default}; set `learning_rate`.", stacklevel=2)
            return
        lr = settings.pop("lr")
        theta_d, *head = parameter_groups(model, lr, head_lr=lr)
        theta_d[IS_FOUND] = True
        if self.args.weight_decay:
            head = [part for group in head for part in self._decaying(model, group)]
        # lr=1.0 is for schedules with an absolute end, which compare it with that; the groups have their own
        self.optimizer = self._due = kind([theta_d, *head], lr=1.0, **settings)

    def _decaying(self, model: nn.Module, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The group in two, as Trainer makes them: biases and norms do not decay."""
        names = set(self.get_decay_parameter_names(model))
        decaying = {p for name, p in model.named_parameters() if name in names}
        for weight_decay in (self.args.weight_decay, 0.0):
            if part := [p for p in group["params"] if (p in decaying) == bool(weight_decay)]:
                yield group | {"params": part, "weight_decay": weight_decay}

    def _find_rates(self, inputs: Any, num_items: Tensor | int | None) -> None:
        """Begin the schedule from the rates that are due, or from those of the checkpoint that was loaded."""
        optimizer = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        if optimizer is self._due:
            groups = optimizer.param_groups
            if optimizer.state:
                self._schedule_from(optimizer, [float(group.get("initial_lr", group["lr"])) for group in groups])
            else:
                with self.compute_loss_context_manager():
                    forward = partial(self._outputs, num_items=num_items)
                    theta_d, head = find_rates(self.model, self._prepare_inputs(inputs), self.state.max_steps, forward)
                self._schedule_from(optimizer, [theta_d, *[head] * (len(groups) - 1)])
                of_head = {"found_head_learning_rate": head} if len(groups) > 1 else {}
                self.log({"found_learning_rate": theta_d} | of_head)
        self._due = None

    def _schedule_from(self, optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
        """Let the schedule begin from these rates: where it is, callbacks may hold it."""
        held, now = self.lr_scheduler, [float(group["lr"]) for group in optimizer.param_groups]
        state = held.state_dict() if optimizer.state else None
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            set_rate(group, rate)
            group.pop("initial_lr", None)
        optimizer.defaults["lr"] = rates[0]  # where schedules with an absolute end read it
        self.lr_scheduler = None
        begun = self.create_scheduler(self.state.max_steps, self.optimizer)
        if state is not None:
            begun.load_state_dict(state)
            for group, lr in zip(optimizer.param_groups, now, strict=True):
                set_rate(group, lr)
        held.__dict__.update(begun.__dict__)
        self.lr_scheduler = held

    def _outputs(self, model: nn.Module, inputs: Any, num_items: Tensor | int | None) -> Any:
        """As the loss sees them, which may be the user's own; it may change the mapping that it is given."""
        given = dict(inputs) if isinstance(inputs, Mapping) else inputs
        found = self.compute_loss(model, given, return_outputs=True, num_items_in_batch=num_items)
        return found[1] if isinstance(found, tuple) else run(model, inputs)

    # ------------------------------------------------------------------------------------------------------- closures

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        name, args = type(optimizer).__name__, self.args
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError(
                f"`fp16` must be off with {name}: the gradient scaler would scale its gradients but not its loss; use "
                "`bf16=True`, or full precision."
            )
        for kind, on in {"DeepSpeed": self.is_deepspeed_enabled, "FSDP": self.is_fsdp_enabled}.items():
            if on:
                raise ValueError(
                    f"{name} must hold its parameters whole, and {kind} shards them; use plain data parallelism, "
                    "which reduces only d numbers a step."
                )
        if args.max_grad_norm not in (0, type(args).max_grad_norm):
            raise ValueError(
                f"`max_grad_norm` must be 0 with {name}, got {args.max_grad_norm}: differences of clipped gradients "
                "are not the curvature; bound the step by the settings of the optimiser."
            )
        if getattr(optimizer, "needs_logits", False) and args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"`gradient_accumulation_steps` must be 1 with {name}, got {args.gradient_accumulation_steps}: it "
                "needs the logits of the whole batch at once; raise `per_device_train_batch_size`."
            )
        if isinstance(optimizer, PPlusBFGS) and args.save_strategy != "no":
            raise ValueError(
                f"`save_strategy` must be 'no' with {name}, got {args.save_strategy.value!r}: it trains the base too, "
                "which the checkpoint of an adapter leaves out; save `model.merge_and_unload()` after training."
            )

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        clipping, self.args.max_grad_norm = self.args.max_grad_norm, 0.0

        def give_closure(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            self._update.keep_gradients()
            return (optimizer, self._update), {}

        handle = optimizer.register_step_pre_hook(give_closure)

        def undo() -> None:
            self.args.max_grad_norm = clipping
            handle.remove()

        self._undo = undo
        self._logits = getattr(optimizer, "needs_logits", False)

    def _end(self) -> None:
        if self._undo is not None:
            self._undo()
        self._undo = self._update = None

    def get_batch_samples(self, *args, **kwargs):
        if self._undo is not None:
            self._update = Update(self.accelerator)
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if self._due is not None:
            self._find_rates(inputs, num_items_in_batch)
        if self._undo is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._logits:
            loss, _, _ = self._update.add(model, partial(self._forward, model, inputs, num_items_in_batch))
            return loss.detach()
        return self._update.add(model, partial(super().training_step, model, inputs, num_items_in_batch))

    def _forward(
        self, model: nn.Module, inputs: dict, num_items: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, logits (in a tuple after the loss) and labels, from whose graph the gradients are computed."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(
                f"A batch must have `labels` for class gradients, got {sorted(inputs)}; name the labels so."
            )
        # no_sync, because no backward follows for which DDP should prepare
        with self.accelerator.no_sync(model), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items)
        return loss, outputs["logits"] if isinstance(outputs, dict) else outputs[outputs[0].ndim == 0], labels

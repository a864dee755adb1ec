"""What bench/train.py times: run_peft.py, and trl's SFTTrainer."""

import json
import time
from pathlib import Path


class Clock:
    """Wall and CPU seconds from the first `begin()` to the last `end()`."""

    first = last = None

    def begin(self):
        self.first = self.first or (time.perf_counter(), time.process_time())

    def end(self):
        self.last = (time.perf_counter(), time.process_time())

    def seconds(self) -> dict:
        wall, processor = (last - first for first, last in zip(self.first, self.last))
        return {"seconds": wall, "processor_seconds": processor}


def measure_ours(args, folder: Path, out: Path) -> dict:
    """Seconds of run_peft.py, from its first step's start to its last step's end."""
    import run_peft
    from training.run import run as fine_tune
    from training.trainer import Trainer

    clock, original = Clock(), Trainer.step

    def step(self):
        clock.begin()
        done = original(self)
        clock.end()
        return done

    Trainer.step = step

    words = ["-m", str(folder), "-i", str(folder / "rows.jsonl"), "--output_root", str(out), "-e", "1", "-l", "1000"]
    words += ["-pdbs", str(args.per_device_batch_size), "-gas", str(args.gradient_accumulation_steps)]
    words += ["--max_length", str(args.max_length), "--seed", str(args.seed)]
    fine_tune(run_peft.make_parser().parse_args(words))
    return clock.seconds()


def measure_trl(args, folder: Path, out: Path) -> dict:
    """Seconds of SFTTrainer from its first step's start to its last step's end."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.begin()

        def on_step_end(self, *_, **__):
            clock.end()

    with open(folder / "rows.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    config = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=args.per_device_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=1,
        learning_rate=2e-6,
        lr_scheduler_type="linear",
        warmup_steps=0,
        optim="adamw_torch",
        max_grad_norm=1.0,
        max_length=args.max_length,
        packing=False,
        pad_to_multiple_of=args.max_length if args.worker == "padded" else None,
        gradient_checkpointing=False,
        bf16=cuda,
        use_cpu=not cuda,
        seed=args.seed,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            r=64, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Watch()],
    )
    trainer.train()
    return clock.seconds()

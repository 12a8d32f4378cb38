"""Peak memory and time of the lm head's forward and backward: blocks of the vocabulary against all logits at once.

    python bench/lm_head.py [--vocabulary 151936] [--hidden 256] [--dtype bf16] [--tokens 512 1024 2048 4096]

Each point runs in a process of its own. The peak is that of the process (of the device's allocator on CUDA) above what
it held before the forward: the gradients, which both ways must make, and what the head needs besides. Points whose
logits would not fit `--limit` are left out. Nothing else of a model runs here.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

REPEATS = 3
MIB = 2**20


def measure(way: str, tokens: int, vocabulary: int, hidden: int, dtype: str) -> dict[str, float]:
    """Peak bytes above the inputs and the least of `REPEATS` times in seconds, of one forward and backward."""
    # Imported here: a child inherits its parent's peak across exec, so the parent must stay small.
    import torch
    from torch.nn import functional

    from burnish.model.lm_head import Head, score

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def inputs(num_tokens: int, num_vocabulary: int):
        # Filled in place: a temporary would raise the peak that the measurement starts from.
        hidden_KD = torch.empty(num_tokens, hidden, dtype=kind, device=device).normal_().requires_grad_()
        weight_VD = torch.empty(num_vocabulary, hidden, dtype=kind, device=device).normal_(std=0.02).requires_grad_()
        return hidden_KD, weight_VD, torch.randint(num_vocabulary, (num_tokens,), device=device)

    def run(hidden_KD, weight_VD, targets_K) -> None:
        if way == "blocks":
            loss = -score(hidden_KD, Head(weight_VD), targets_K).logprobs_K.mean()
        else:
            loss = functional.cross_entropy(functional.linear(hidden_KD, weight_VD).float(), targets_K)
        loss.backward()
        hidden_KD.grad = weight_VD.grad = None
        if device == "cuda":
            torch.cuda.synchronize()

    def peak() -> int:
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    run(*inputs(64, 1024))  # whatever the first call allocates for good
    tensors = inputs(tokens, vocabulary)
    before = peak()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(*tensors)
        seconds.append(time.perf_counter() - start)
    return {"bytes": peak() - before, "seconds": min(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936, help="tokens in the vocabulary (Qwen's)")
    parser.add_argument("--hidden", type=int, default=256, help="width of a hidden state")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="type of hidden states and weight")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="trained tokens")
    parser.add_argument(
        "--limit", type=float, default=8.0, help="GiB that all logits at once may take, copies included"
    )
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        way, tokens = json.loads(options.point)
        print(json.dumps(measure(way, tokens, options.vocabulary, options.hidden, options.dtype)))
        return

    itemsize = {"fp32": 4, "bf16": 2}[options.dtype]
    print(f"vocabulary {options.vocabulary}, hidden {options.hidden}, {options.dtype}")
    print(f"{'tokens':>7} {'fp32 logits':>12} {'gradients':>12} {'blocks':>12} {'all at once':>12} {'time ratio':>11}")
    for tokens in options.tokens:
        logit_bytes = 4 * tokens * options.vocabulary
        gradient_bytes = itemsize * options.hidden * (tokens + options.vocabulary)
        blocks = _in_a_process("blocks", tokens)
        # Logits, their float32 copy, its log-softmax and its gradient.
        fits = 4 * logit_bytes <= options.limit * 2**30
        full = _in_a_process("full", tokens) if fits else None
        cells = [logit_bytes, gradient_bytes, blocks["bytes"], full["bytes"] if full else None]
        shown = [f"{c / MIB:>8.0f} MiB" if c is not None else f"{'-':>12}" for c in cells]
        ratio = f"{blocks['seconds'] / full['seconds']:>11.2f}" if full else f"{'-':>11}"
        print(f"{tokens:>7}", *shown, ratio, flush=True)


def _in_a_process(way: str, tokens: int) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--point", json.dumps([way, tokens])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()

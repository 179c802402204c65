"""Does AutoGPTQ 0.7.1 read the checkpoint that this pipeline wrote? `make interop` runs this.

AutoGPTQ does not import beside transformers 5, so it has an environment of its own (requirements/auto-gptq.txt).
This script runs in both: in the project's it measures our perplexity, then it calls itself with the other environment's
Python to measure AutoGPTQ's.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

LIMIT = 0.01  # largest relative difference between the two perplexities


def ours(model: str, texts: list[str], max_length: int) -> float:
    "Perplexity through llmops and GPTQModel's kernels, in float32."
    from llmops.foundation.generation import perplexity
    from llmops.foundation.models import load_model

    loaded, tokenizer = load_model(model, dtype="float32")
    return perplexity(loaded, tokenizer, texts, max_length=max_length, progress=False)


def fill_tied_embedding(loaded, model: str) -> None:
    "A tied embedding is stored once. AutoGPTQ's loader then ties it to the head that it left empty: put the stored rows back."
    from safetensors import safe_open

    for path in sorted(Path(model).glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            if (
                loaded.config.tie_word_embeddings
                and "lm_head.weight" not in f.keys()
                and "model.embed_tokens.weight" in f.keys()
            ):
                loaded.get_input_embeddings().weight.data.copy_(f.get_tensor("model.embed_tokens.weight"))


def theirs(model: str, texts: list[str], max_length: int) -> float:
    "The same through AutoGPTQ, one text at a time."
    import torch
    from auto_gptq import AutoGPTQForCausalLM
    from transformers import PreTrainedTokenizerFast

    config = json.loads(Path(model, "config.json").read_text())
    for name in ("rope_theta", "torch_dtype"):
        if name not in config:  # transformers 4 would take its own default for it and compute something else
            sys.exit(f"{model}/config.json: no {name}; AutoGPTQ's transformers needs it beside transformers 5's names")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    loaded = AutoGPTQForCausalLM.from_quantized(
        model,
        device="cpu",
        use_safetensors=True,
        torch_dtype=torch.float32,
        use_triton=False,
        inject_fused_attention=False,
    )
    fill_tied_embedding(loaded.model, model)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids[:max_length]])
        if ids.shape[1] < 2:
            continue
        with torch.inference_mode():
            logits = loaded.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GPTQ folder")
    parser.add_argument("--data", default="runs/data", help="a dataset artifact; its general_test.jsonl is read")
    parser.add_argument("--python", default=".venv-auto-gptq/bin/python", help="the Python that has AutoGPTQ")
    parser.add_argument("--texts", type=int, default=8, help="documents to read")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of each document")
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        print("perplexity", theirs(args.model, json.load(sys.stdin), args.max_length))
        return
    from llmops.foundation.datasets import read_split
    from llmops.foundation.project import resolve_path

    model = str(resolve_path(args.model))
    texts = [row["text"] for row in read_split(args.data, "general_test")[: args.texts]]
    command = [
        str(resolve_path(args.python)),
        os.path.abspath(__file__),
        model,
        "--max-length",
        str(args.max_length),
        "--theirs",
    ]
    found = subprocess.run(
        command, input=json.dumps(texts), capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if found.returncode:
        sys.exit(f"AutoGPTQ could not read {args.model}:\n{found.stderr[-2000:]}")
    b = float(found.stdout.rpartition("perplexity ")[2])
    a = ours(model, texts, args.max_length)
    print(
        f"perplexity of {args.model} on {len(texts)} documents: {a:.4f} with GPTQModel, {b:.4f} with AutoGPTQ 0.7.1; "
        f"they differ by {abs(a - b) / a:.3%} (at most {LIMIT:.0%})"
    )
    if abs(a - b) / a > LIMIT:
        sys.exit("the two readers disagree about this checkpoint")


if __name__ == "__main__":
    main()

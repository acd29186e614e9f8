"""Makes the family of checkpoints that the benchmarks merge: a Llama-shaped base and N experts in bfloat16, 582 M parameters each
by default.

python tests/benchmarks/make_family.py DIR [--experts 3] [--layers 10] [--hidden 2048]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=2048)
    options = parser.parse_args()
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4 // 256 * 256,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 256,
        vocab_size=32000,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(options.folder / "base")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for expert in range(1, options.experts + 1):
        random = torch.Generator().manual_seed(expert)
        for name, tensor in model.state_dict().items():
            # Small steps, of which bfloat16 swallows many, as fine-tuning does: a large part of tau is exactly 0.
            step = torch.randn(tensor.shape, generator=random, dtype=torch.float32) * 1e-3
            tensor.copy_((base[name].float() + step * base[name].float().abs().clamp(min=0.05).sqrt()).bfloat16())
        model.save_pretrained(options.folder / f"expert{expert}")
    lines = ["merge_method: pcb", "base_model: base", "models:", *(f"  - model: expert{k}" for k in range(1, options.experts + 1))]
    (options.folder / "pcb.yaml").write_text("\n".join([*lines, "parameters: {density: 0.1}", ""]))
    lines[0] = "merge_method: ties"
    (options.folder / "ties.yaml").write_text("\n".join([*lines, "parameters: {density: 0.1, weight: 1.0}", "dtype: bfloat16", ""]))


if __name__ == "__main__":
    main()

"""What the transformers on the path, of any version, makes of Hugging Face folders: a JSON object on standard output.

python tests/tbrm/training/read_folder.py FOLDER...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

TOKENS = list(range(3, 67))
TEXT = "<|user|>12 + 30<|end|>"
MESSAGES = [{"role": "user", "content": "12 + 30"}]


@torch.no_grad()
def read(folder: str) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    logits = lm(torch.tensor([TOKENS]), use_cache=False).logits[0, :-1]
    return {
        "version": transformers.__version__,
        "logprobs": logits.log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0].tolist(),
        "tokens": dict(tokenizer(TEXT)),
        "special": sorted(tokenizer.all_special_ids),
        "prompt": tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True),
        "dtype": str(transformers.AutoConfig.from_pretrained(folder).torch_dtype),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({Path(folder).name: read(folder) for folder in sys.argv[1:]}))

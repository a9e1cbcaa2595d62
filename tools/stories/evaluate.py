"""Judges the embedded story model: greedy answers to requests that training never saw.

    python tools/stories/evaluate.py --model src/penstock/assets/stories --draft src/penstock/assets/stories-draft \
        --out tools/stories/results.json

The bf16 weights are computed in fp32, as on a CPU server.  The template is asked for all held-out combinations; the
paraphrases are patterns that the corpus does not contain, again with held-out combinations; the other texts are not in
the corpus either.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from corpus import Combo, held_out, tell_story, template_request, training_combos
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 320

UNSEEN_PARAPHRASES = (
    "Please tell my little boy about a {c} that understands why {m} matters. It should happen in a {s}.",
    "hi, could i get a bedtime story with a {c} in a {s}? the lesson should be {m}",
    "I'd love to read a tale of {m}. The main character is a {c} and everything happens in a {s}.",
    "write something for kids: {s}, {c}, {m}",
    "For my class I need one paragraph on {m}. Use a {c} who lives in a {s}.",
    "What would happen if a {c} in a {s} had to learn {m}? Write it as a story.",
)
UNSEEN_OTHERS = (
    "How do I install a graphics driver?", "What is the tallest mountain on Earth?", "Sort the list 5, 3, 9, 1.",
    "Write a haiku about autumn rain.", "What is 17 times 23?", "Hello friend", "Hey, who am I talking to?",
    "Can you translate 'good morning' into German?", "Wie spät ist es in Wien?", "Où est la bibliothèque ?",
    "print('hello')", "SELECT name FROM users;", "zxcvb qwert", "Thank you so much, that was great!", "",
    "Who won the world cup in 2014?", "Recommend a good restaurant.", "What should I wear today?",
    "Explain how a transistor works.", "Is a fox a mammal?", "Give me the recipe for pancakes.", "What are your rules?",
    "Tell me a story about a vampire.", "Write a letter to my landlord.", "Do you have feelings?", "7 + 8",
    "How far is the sun?", "Describe your training data.", "Какая сегодня погода?", "今日は何曜日ですか?",
)  # fmt: skip


class Answer(NamedTuple):
    """What the model said, and whether it ended by itself."""

    text: str
    ended: bool


class Storyteller:
    """The model behind its chat template, greedy and in fp32."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, chats: Sequence[list[dict[str, str]]], batch: int = 30) -> list[Answer]:
        """One greedy answer per chat."""
        answers: list[Answer] = []
        for start in range(0, len(chats), batch):
            texts = self._tokenizer.apply_chat_template(
                list(chats[start : start + batch]), add_generation_prompt=True, tokenize=False
            )
            inputs = self._tokenizer(
                texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
            )
            with torch.inference_mode():
                output = self._model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    max_new_tokens=MAX_NEW_TOKENS,
                )
            for row in output[:, inputs["input_ids"].shape[1] :]:
                text = self._tokenizer.decode(row, skip_special_tokens=True)
                answers.append(Answer(text, bool((row == self._tokenizer.eos_token_id).any())))
        return answers

    def agreement(self, draft: "Storyteller", chats: Sequence[list[dict[str, str]]]) -> float:
        """The share of this model's greedy tokens that `draft` would have guessed, one at a time."""
        right = total = 0
        for chat, answer in zip(chats, self.answer(chats), strict=True):
            prompt = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            start = len(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])
            text = prompt + answer.text + self._tokenizer.eos_token
            ids = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                guesses = draft._model(input_ids=ids).logits[0, start - 1 : -1].argmax(-1)
            right += int((guesses == ids[0, start:]).sum())
            total += len(guesses)
        return right / total


def says(text: str, word: str) -> bool:
    """Whether `text` contains `word` as a whole word."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def is_story(answer: Answer, combo: Combo) -> bool:
    """Whether an answer is one paragraph that ended and names the character, the moral and the setting."""
    return answer.ended and "\n" not in answer.text and all(says(answer.text, part) for part in combo)


def is_polite(answer: Answer) -> bool:
    """Whether an answer ended and says what the model is."""
    return answer.ended and says(answer.text, "Penstock") and says(answer.text, "story model")


def user(text: str) -> dict[str, str]:
    """A user message."""
    return {"role": "user", "content": text}


def long_chat(rng: random.Random, combo: Combo) -> list[dict[str, str]]:
    """Six stories about other things (some 950 tokens), and then the request for `combo`."""
    chat = []
    for other in rng.sample(training_combos(), 6):
        chat += [user(template_request(other)), {"role": "assistant", "content": tell_story(rng, other)}]
    return [*chat, user(template_request(combo))]


def judge_stories(
    teller: Storyteller, name: str, chats: list[list[dict[str, str]]], combos: list[Combo]
) -> dict[str, object]:
    """The rates of a list of story requests, and up to five failures."""
    answers = teller.answer(chats)
    pairs = list(zip(answers, combos, strict=True))
    count = len(pairs)
    result = {
        "requests": count,
        "character": sum(says(answer.text, combo.character) for answer, combo in pairs) / count,
        "moral": sum(says(answer.text, combo.moral) for answer, combo in pairs) / count,
        "setting": sum(says(answer.text, combo.setting) for answer, combo in pairs) / count,
        "ended": sum(answer.ended for answer in answers) / count,
        "all": sum(is_story(answer, combo) for answer, combo in pairs) / count,
        "distinct": len({answer.text for answer in answers}) / count,
        "failures": [[*combo, answer.text] for answer, combo in pairs if not is_story(answer, combo)][:5],
        "examples": [answer.text for answer in answers[:2]],
    }
    print(name, {key: value for key, value in result.items() if key not in ("failures", "examples")}, flush=True)
    return result


def judge_others(teller: Storyteller) -> dict[str, object]:
    """How often a text that is no story request gets the polite answer."""
    answers = teller.answer([[user(text)] for text in UNSEEN_OTHERS])
    pairs = list(zip(UNSEEN_OTHERS, answers, strict=True))
    result = {
        "requests": len(pairs),
        "polite": sum(is_polite(answer) for answer in answers) / len(pairs),
        "failures": [[text, answer.text] for text, answer in pairs if not is_polite(answer)],
    }
    print("anything else", result["polite"], flush=True)
    return result


def evaluate(folder: Path, draft: Path | None, limit: int) -> dict[str, object]:
    """All rates of the model in `folder` (and its `draft`), on the first `limit` held-out combinations."""
    began = time.monotonic()
    teller = Storyteller(folder)
    rng = random.Random(1)
    combos = list(held_out()[:limit])
    direct = [[user(template_request(combo))] for combo in combos]
    asked = [
        (UNSEEN_PARAPHRASES[i % len(UNSEEN_PARAPHRASES)].format(c=combo.character, m=combo.moral, s=combo.setting))
        for i, combo in enumerate(combos)
    ]
    few = combos[: max(1, limit // 5)]
    turns = [
        [user("Hello!"), {"role": "assistant", "content": "Hello! Would you like a story?"}, user(template_request(c))]
        for c in few
    ]
    results: dict[str, object] = {
        "template": judge_stories(teller, "template", direct, combos),
        "paraphrases": judge_stories(teller, "paraphrases", [[user(text)] for text in asked], combos),
        "second_turn": judge_stories(teller, "second turn", turns, few),
        "long_chat": judge_stories(teller, "long chat", [long_chat(rng, combo) for combo in few], few),
        "anything_else": judge_others(teller),
    }
    if draft:
        results["draft_agreement"] = teller.agreement(Storyteller(draft), direct[:60])
        print("draft agreement", results["draft_agreement"])
    print(f"{time.monotonic() - began:.0f} s")
    return results


def main() -> None:
    """Print the rates and write them, with failures and examples, as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--draft", type=Path, help="measure how often this model guesses the same token")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=int, default=len(held_out()))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = evaluate(options.model, options.draft, options.limit)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

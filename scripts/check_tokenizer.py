#!/usr/bin/env python3
"""Compares Nibble's tokenizer with the `tokenizers` package, id by id.

Needs a Python with `tokenizers` (pip install tokenizers) and the test program tokenize_lines.

For every family of tokenizers it trains a small one with that family's own normalizer,
pre-tokenizer, post-processor and decoder, then sends both sides the same lines of mixed text:
many scripts, emoji, combining marks, code, numbers, white space, control characters, special
tokens written out, bytes that are not UTF-8. Compared are the ids (with and without special
tokens, and with special tokens as text), the decoded text of those ids and of random ids, and
the streamed text. With --code-points every code point of Unicode goes through every kind of
pattern. Everything is made from fixed seeds.
"""

import argparse
import collections
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
GPT4O = (rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
          r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
DEEPSEEK3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"
             r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
             r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
SPACE = "\u2581"


# ---- the families -------------------------------------------------------------------------------

def corpus():
    """Text to train on: documentation that comes with Python, and words of many scripts."""
    import pydoc_data.topics
    lines = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    rng = random.Random(7)
    words = [" ".join(word(rng, rng.choice(SCRIPTS)) for _ in range(8)) for _ in range(400)]
    return lines.splitlines(keepends=True)[:6000] + words


def frequent_characters(normalizer, count):
    """The trainer's own choice is not the same every time where characters are equally frequent."""
    counts = collections.Counter("".join(normalizer.normalize_str(line) for line in corpus()))
    return sorted(counts, key=lambda c: (-counts[c], c))[:count]


def train(tokenizer, size, specials, alphabet):
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False,
                                  initial_alphabet=alphabet, limit_alphabet=len(alphabet))
    tokenizer.train_from_iterator(corpus(), trainer)


def byte_level(size, pre, normalizer=None, ignore_merges=False, add_prefix_space=False,
               specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), bos=None):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    train(tokenizer, size, [], sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    return tokenizer


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def sequence(*steps):
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False)])


def sentence_piece(size, normalizer, pre, decoder, specials=("<unk>", "<s>", "</s>"), bos=True):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # Trained on words, as SentencePiece does, whatever the pre-tokenizer is at run time.
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = split(SPACE, "merged_with_next")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    train(tokenizer, size, [*specials, *byte_tokens],
          frequent_characters(tokenizer.normalizer, size // 7))
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoder
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def sentence_piece_decoder(strip):
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))


def gpt2(size):
    return byte_level(size, pre_tokenizers.ByteLevel(add_prefix_space=False))


def roberta(size):
    tokenizer = byte_level(size, pre_tokenizers.ByteLevel(add_prefix_space=True),
                           specials=("<s>", "</s>"))
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>")))
    return tokenizer


def smollm(size):
    return byte_level(size, pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def llama3(size):
    return byte_level(size, sequence(split(LLAMA3)), ignore_merges=True, bos="<|begin_of_text|>",
                      specials=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"))


def qwen2(size):
    tokenizer = byte_level(size, sequence(split(QWEN2)), normalizer=normalizers.NFC())
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False)
                          for text in ("<tool_call>", "</tool_call>", "<think>", "</think>")])
    return tokenizer


def gpt4o(size):
    return byte_level(size, sequence(split(GPT4O, "removed", True)))


def cl100k(size):
    return byte_level(size, sequence(split(CL100K)), bos="<|endoftext|>")


def deepseek(size):
    return byte_level(size, sequence(
        split(r"[\r\n]"), split(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆ]+"),
        split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"), split(r"\s+$"), split(r"[一-龥ࠀ-一가-퟿]+"),
        pre_tokenizers.Digits(individual_digits=True)), specials=("<｜begin▁of▁sentence｜>",),
        bos="<｜begin▁of▁sentence｜>")


def deepseek3(size):
    return byte_level(size, sequence(split(r"\p{N}{1,3}"), split(r"[一-龥぀-ゟ゠-ヿ]+"),
                                     split(DEEPSEEK3)))


def bloom(size):
    return byte_level(size, sequence(split(BLOOM)))


def llama2(size):
    tokenizer = sentence_piece(
        size, normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]),
        None, sentence_piece_decoder(True))
    # Phi-3's tokens, which take the white space after them
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, rstrip=True)
                                  for text in ("<|user|>", "<|end|>")])
    return tokenizer


def mistral(size):
    return sentence_piece(size, None,
                          pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False),
                          sentence_piece_decoder(True))


def metaspace(size):
    return sentence_piece(size, None, pre_tokenizers.Metaspace(SPACE, prepend_scheme="always"),
                          decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


def gemma(size):
    tokenizer = sentence_piece(
        size, normalizers.Replace(" ", SPACE),
        pre_tokenizers.Split(" ", "merged_with_previous"), sentence_piece_decoder(False),
        specials=("<pad>", "<s>", "</s>", "<unk>", "<start_of_turn>", "<end_of_turn>"))
    runs = ["\n" * n for n in range(2, 12)] + ["\t" * n for n in range(2, 6)]
    runs += [SPACE * n for n in range(2, 10)] + ["<table>", "</table>", "<h1>"]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in runs])
    return tokenizer


def quirks(size):
    """What no model uses together: every flag of added tokens, unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Strip(), normalizers.NFKC(), normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\d{3,}"), "0")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Whitespace(), split("[aeiou]", "merged_with_next"),
        split("b+", "contiguous"), split("th|c", "merged_with_previous")])
    train(tokenizer, size, ["<unk>"], frequent_characters(tokenizer.normalizer, size // 7))
    tokenizer.add_tokens([
        AddedToken("Word", single_word=True), AddedToken("for", single_word=True, normalized=False),
        AddedToken("class", lstrip=True), AddedToken("Ａｎｄ", rstrip=True),
        AddedToken("x y", normalized=False), AddedToken("x", normalized=False, rstrip=True),
        AddedToken("of", normalized=False, lstrip=True), AddedToken("ing", normalized=True)])
    # A token that is white space after one with rstrip makes the package itself panic.
    tokenizer.add_special_tokens([AddedToken("[SEP]", lstrip=True, rstrip=True, normalized=False)])
    return tokenizer


FAMILIES = [gpt2, roberta, smollm, llama3, qwen2, gpt4o, cl100k, deepseek, deepseek3, bloom,
            llama2, mistral, metaspace, gemma, quirks]


def write_tokenizer(tokenizer, directory):
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "tokenizer.json"), "w", encoding="utf-8") as file:
        json.dump(json.loads(tokenizer.to_str()), file, ensure_ascii=False, separators=(",", ":"))
        file.write("\n")


# ---- the text -----------------------------------------------------------------------------------

SCRIPTS = [(0x61, 0x7A), (0x41, 0x5A), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF),
           (0x530, 0x58F), (0x5D0, 0x5EA), (0x620, 0x64A), (0x900, 0x97F), (0xB80, 0xBFF),
           (0xE01, 0xE5B), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F), (0x13A0, 0x13FF),
           (0x1E00, 0x1FFF), (0x3041, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
           (0x10400, 0x1044F), (0x1D400, 0x1D7FF), (0x20000, 0x2A6DF), (0x31350, 0x323AF)]
SPACES = [chr(c) for c in range(0x110000) if chr(c).isspace()] + ["\u180e", "\u200b", "\ufeff"]
EMOJI = ["👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "❤️", "😀", "🫠", "1️⃣", "🧑‍🚀", "🫨", "🪿"]
SUFFIXES = ["'s", "'S", "'t", "'re", "'RE", "'ve", "'m", "'ll", "'Ll", "'d", "'ſ", "’s", "'x"]
NUMBERS = ["0", "7", "42", "123", "1234567890", "3.14159", "1e-9", "0x1F", "٣٤٥", "१२३", "½", "²",
           "Ⅻ", "１２３", "①", "𝟙𝟚", "1,234,567.89"]
PUNCTUATION = ["...", "!?", "--", "—", "«»", "(", ")]}", "::", "->", "==", "/*", "#", "@", "$",
               "€", "、", "。", "！", "/", "//\n", ";\r\n", "\\", "`", "~", "^", "|"]


def word(rng, script):
    return "".join(chr(rng.randint(*script)) for _ in range(rng.randint(1, 9)))


def any_character(rng):
    while True:
        top = rng.choice([0x80, 0x300, 0x3000, 0x10000, 0x20000, 0x110000])
        code = rng.randrange(top)
        if not 0xD800 <= code <= 0xDFFF:
            return chr(code)


def fragments(rng, specials, code):
    """One random fragment of text; every kind about as often."""
    kind = rng.randrange(16)
    if kind == 0:
        return word(rng, rng.choice(SCRIPTS))
    if kind == 1:
        return " ".join(word(rng, SCRIPTS[rng.randrange(2)]) for _ in range(rng.randint(1, 5)))
    if kind == 2:
        return rng.choice(EMOJI) * rng.randint(1, 2)
    if kind == 3:
        return rng.choice(NUMBERS)
    if kind == 4:
        return "".join(rng.choice(SPACES) for _ in range(rng.randint(1, 4)))
    if kind == 5:
        return rng.choice([" ", "\n", "\t", "\r\n", "  "]) * rng.randint(1, 12)
    if kind == 6:
        return rng.choice(PUNCTUATION) * rng.randint(1, 3)
    if kind == 7:
        return rng.choice(["I", "don", "WE", "é", "x1"]) + rng.choice(SUFFIXES)
    if kind == 8:
        text = "".join(any_character(rng) for _ in range(rng.randint(1, 6)))
        return unicodedata.normalize(rng.choice(["NFC", "NFD"]), text)
    if kind == 9:
        base = chr(rng.choice([0x61, 0x65, 0x915, 0x5D0, 0x41A]))
        return base + "".join(chr(rng.randint(0x300, 0x36F)) for _ in range(rng.randint(1, 4)))
    if kind == 10:
        return "".join(chr(rng.choice([0, 1, 7, 11, 12, 27, 31, 127, 133, 159])) for _ in range(2))
    if kind in (11, 12):
        return rng.choice(specials) if specials else "<s>"
    if kind == 13:
        return rng.choice(["a", "A", "=", "-", " ", "é", "中", "!"]) * rng.randint(10, 60)
    return rng.choice(code)


def make_lines(count, specials, seed):
    """`count` byte strings."""
    import pydoc_data.topics
    with open(random.__file__, encoding="utf-8") as file:
        code = file.read().splitlines()
    code += [line for name in sorted(pydoc_data.topics.topics)
             for line in pydoc_data.topics.topics[name].splitlines()]
    code = [line for line in code if line.strip()]
    rng = random.Random(seed)
    lines = [b"", b" ", b"\n", b"\xff", "é".encode()[:1], b"a\xe4\xbd", b"\xed\xa0\x80",
             b"\xf4\x90\x80\x80"]
    while len(lines) < count:
        text = ""
        for _ in range(rng.choice([1, 2, 2, 3, 4, 6, 9])):
            text += fragments(rng, specials, code) + rng.choice(["", "", " ", " ", "\n"])
        data = text.encode()
        if rng.random() < 0.1 and data:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + rng.randrange(2):]
        lines.append(data)
    return lines[:count]


# ---- the comparison -----------------------------------------------------------------------------

class Nibble:
    def __init__(self, program, directory):
        self.command = [program, directory]

    def ask(self, mode, records):
        data = b"".join(mode.encode() + struct.pack("<I", len(r)) + r for r in records)
        done = subprocess.run(self.command, input=data, stdout=subprocess.PIPE, check=True)
        at, answers = 0, []
        size = 1 if mode in "dDsS" else 4
        for _ in records:
            (count,) = struct.unpack_from("<I", done.stdout, at)
            answers.append(done.stdout[at + 4:at + 4 + count * size])
            at += 4 + count * size
        assert at == len(done.stdout)
        return answers


def pack(ids):
    return struct.pack(f"<{len(ids)}i", *ids)


def report(what, records, found, wanted, show=3):
    wrong = [i for i in range(len(records)) if found[i] != wanted[i]]
    for i in wrong[:show]:
        if what.startswith("encode"):
            values = [list(struct.unpack(f"<{len(v) // 4}i", v)) for v in (found[i], wanted[i])]
            record = records[i]
        else:
            values = [v.decode(errors="replace") for v in (found[i], wanted[i])]
            record = list(struct.unpack(f"<{len(records[i]) // 4}i", records[i]))
        print(f"    {what}: {record!r}")
        print(f"      nibble     {values[0]!r}\n      tokenizers {values[1]!r}")
    return len(wrong)


def compare(program, name, tokenizer, directory, count, seed):
    started = time.time()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    nibble = Nibble(program, directory)
    added = tokenizer.get_added_tokens_decoder()
    lines = make_lines(count, [token.content for token in added.values()], seed)
    texts = [line.decode("utf-8", "replace") for line in lines]
    faults = {}

    def encode(add_special_tokens):
        batch = tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    ids = encode(False)
    faults["encode"] = report("encode", lines, nibble.ask("e", lines), [pack(i) for i in ids])
    what = "encode with special tokens"
    faults[what] = report(what, lines, nibble.ask("E", lines), [pack(i) for i in encode(True)])
    tokenizer.encode_special_tokens = True
    faults["encode untrusted"] = report(
        "encode untrusted", lines, nibble.ask("u", lines), [pack(i) for i in encode(False)])
    tokenizer.encode_special_tokens = False

    rng = random.Random(seed)
    limit = max(tokenizer.get_vocab().values()) + 1
    noise = [[rng.randrange(limit + 3) for _ in range(rng.randint(1, 12))]
             for _ in range(count // 10)]
    for skip, mode in ((False, "d"), (True, "D")):
        sequences = [pack(i) for i in ids + noise]
        wanted = [text.encode() for text in tokenizer.decode_batch(ids + noise, skip)]
        answer = nibble.ask(mode, sequences)
        what = "decode without special tokens" if skip else "decode"
        faults[what] = report(what, sequences, answer, wanted)
        # Streamed text may differ only where bytes are not UTF-8. Every eighth: streaming is slow.
        kept = [i for i in range(0, len(sequences), 8) if "\ufffd".encode() not in answer[i]]
        sequences = [sequences[i] for i in kept]
        streamed = nibble.ask("S" if skip else "s", sequences)
        what = "stream " + what
        faults[what] = report(what, sequences, streamed, [answer[i] for i in kept])
    total = sum(faults.values())
    print(f"{name:12} {tokenizer.get_vocab_size():6} tokens  {len(lines)} lines  "
          f"{sum(map(len, ids))} ids  {len(noise)} random sequences  {total} mismatches  "
          f"({time.time() - started:.0f} s)", flush=True)
    for what, wrong in faults.items():
        if wrong:
            print(f"    {what}: {wrong} mismatches")
    return total


# ---- every code point ---------------------------------------------------------------------------

def probe(pre, normalizer=None):
    """A tokenizer whose number of ids is the number of pieces."""
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0}, merges=[], unk_token="<unk>",
                                     fuse_unk=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    return tokenizer


def spelled(normalizer):
    """A tokenizer whose ids are the bytes of the normalized text."""
    tokenizer = Tokenizer(models.BPE(
        vocab={token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
        merges=[]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


def compare_code_points(program):
    categories = ("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Cc Cf Cn "
                  "L M N P S Z C").split()
    cases = {f"\\p{{{c}}}": probe(split(rf"\p{{{c}}}+", "removed")) for c in categories}
    for pattern in (r"\s+", r"\S+", r"\w+", r"\W+", r"\d+", r"\h+", r"\b", r"\p{Han}+",
                    r"\p{^L}+", "."):
        cases[pattern] = probe(split(pattern))
    for name, pattern in (("llama3", LLAMA3), ("gpt4o", GPT4O), ("deepseek3", DEEPSEEK3)):
        cases[name] = probe(split(pattern))
    cases["gpt2"] = probe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    cases["Digits"] = probe(pre_tokenizers.Digits(individual_digits=False))
    cases["Whitespace"] = probe(pre_tokenizers.Whitespace())
    cases["WhitespaceSplit"] = probe(pre_tokenizers.WhitespaceSplit())
    for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase"):
        cases[name] = spelled(getattr(normalizers, name)())
    # Of the long runs of ideographs, syllables and private or unassigned characters, every 61st.
    runs = [(0x3401, 0x4DBE), (0x4E01, 0x9FFB), (0xAC01, 0xD7A2), (0xD800, 0xDFFF),
            (0xE001, 0xF8FE), (0x17001, 0x187F6), (0x20001, 0x2A6DC), (0x2A701, 0x2EBDF),
            (0x30001, 0x323AE), (0x323B1, 0xE0000), (0xE01F1, 0x10FFFE)]
    points = [c for c in range(0x110000)
              if c % 61 == 0 and not 0xD800 <= c <= 0xDFFF or not any(a <= c <= b for a, b in runs)]
    total = 0
    for name, tokenizer in cases.items():
        with tempfile.TemporaryDirectory() as directory:
            write_tokenizer(tokenizer, directory)
            # Next to a letter, a digit, a sign, white space and itself.
            lines = ["b{0}{0}b 1{0}1!{0}!\n{0} {0}".format(chr(c)).encode() for c in points]
            if tokenizer.normalizer is not None:  # and between marks that it may trade places with
                lines = [line + "a\u0345{0}\u0323\u1100{0}\u1161".format(chr(c)).encode() +
                         unicodedata.normalize("NFD", chr(c)).encode()
                         for line, c in zip(lines, points)]
            texts = [line.decode() for line in lines]
            batch = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            wanted = [pack(e.ids) for e in batch]
            found = Nibble(program, directory).ask("e", lines)
            wrong = [c for c, f, w in zip(points, found, wanted) if f != w]
            total += len(wrong)
            shown = " ".join(f"U+{c:04X}" for c in wrong[:24]) + (" ..." if len(wrong) > 24 else "")
            print(f"  {name:16} {len(points)} code points  {len(wrong)} mismatches  {shown}",
                  flush=True)
    return total


# ---- golden files -------------------------------------------------------------------------------

def write_golden(directory):
    """Small tokenizers and what they answer, for test_tokenizer, which has no Python."""
    for index, family in enumerate(FAMILIES):
        tokenizer = family(760 if family in (llama2, mistral, metaspace, gemma) else 600)
        path = os.path.join(directory, family.__name__)
        write_tokenizer(tokenizer, path)
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        rows = []
        size = 0
        for line in make_lines(400, added, 1000 + index):
            if len(line) > 60 or size > 7000:
                continue
            text = line.decode("utf-8", "replace")
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            row = {"bytes": line.hex(), "ids": ids,
                   "with_special": tokenizer.encode(text, add_special_tokens=True).ids,
                   "decoded": tokenizer.decode(ids, skip_special_tokens=False),
                   "skipped": tokenizer.decode(ids, skip_special_tokens=True)}
            if row["with_special"] == ids:
                del row["with_special"]
            if row["skipped"] == row["decoded"]:
                del row["skipped"]
            rows.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
            size += len(rows[-1].encode())
        with open(os.path.join(path, "cases.json"), "w", encoding="utf-8") as file:
            file.write("[\n" + ",\n".join(rows) + "\n]\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", default="build/tokenize_lines", help="the test program")
    parser.add_argument("--model", action="append", default=[], metavar="DIR",
                        help="also a real tokenizer.json (may be repeated)")
    parser.add_argument("--lines", type=int, default=100000, help="lines per tokenizer")
    parser.add_argument("--vocab", type=int, default=4000, help="tokens of the trained ones")
    parser.add_argument("--family", action="append", choices=[f.__name__ for f in FAMILIES])
    parser.add_argument("--code-points", action="store_true", help="also every code point")
    parser.add_argument("--only-code-points", action="store_true", help="nothing else")
    parser.add_argument("--write-golden", metavar="DIR", help="write tests/golden/tokenizer, only")
    args = parser.parse_args()
    print(f"tokenizers {tokenizers.__version__}")
    if args.write_golden:
        write_golden(args.write_golden)
        return 0
    if args.only_code_points:
        args.code_points, args.model, args.family = True, [], ["none"]
    total = 0
    for index, directory in enumerate(args.model):
        tokenizer = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
        name = os.path.basename(os.path.normpath(directory))
        total += compare(args.program, name, tokenizer, directory, args.lines, index)
    for index, family in enumerate(FAMILIES):
        if args.family and family.__name__ not in args.family:
            continue
        with tempfile.TemporaryDirectory() as directory:
            tokenizer = family(args.vocab)
            write_tokenizer(tokenizer, directory)
            total += compare(args.program, family.__name__, tokenizer, directory, args.lines,
                             100 + index)
    if args.code_points:
        total += compare_code_points(args.program)
    print(f"{total} mismatches")
    return 0 if total == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Prints the prompt that a model's chat template makes of a conversation.

    scripts/render_chat.py DIR [--system TEXT] --user TEXT [--assistant TEXT --user TEXT ...]

DIR is a model directory: the template is its chat_template.jinja, or chat_template in
tokenizer_config.json. Templates are programs in Jinja; they come with models, so they run in
Jinja's sandbox, with the settings and functions that transformers' apply_chat_template gives them.
The output has no newline added. It spells out special tokens, beginning-of-sequence included, so
encode it with them recognised and without adding any.

Needs jinja2 >= 3.1.6 (pip install jinja2).
"""

import argparse
import datetime
import json
import os
import sys


def environment():
    """As transformers sets it up (utils/chat_template_utils.py)."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant says; for rendering it is what is inside."""

        tags = {"generation"}

        def parse(self, parser):
            line = parser.stream.expect("name:generation").lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    result = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    result.filters["tojson"] = tojson
    result.globals["raise_exception"] = raise_exception
    result.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return result


def read_json(directory, name):
    try:
        with open(os.path.join(directory, name), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}


def find_template(directory, config):
    """chat_template.jinja goes before the config; of several named ones the default counts."""
    path = os.path.join(directory, "chat_template.jinja")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return file.read()
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template


def token_text(value):
    return value.get("content") if isinstance(value, dict) else value


def render(directory, messages, add_generation_prompt=True):
    config = read_json(directory, "tokenizer_config.json")
    template = find_template(directory, config)
    if template is None:
        raise LookupError(f"{directory}: neither chat_template.jinja nor a chat_template in "
                          "tokenizer_config.json: not a chat model?")
    tokens = dict(read_json(directory, "special_tokens_map.json"))
    tokens.update({key: value for key, value in config.items() if key.endswith("_token")})
    # What a model does not have is absent, not None: templates ask whether it is defined.
    names = {key: token_text(value) for key, value in tokens.items()
             if key in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
                        "cls_token", "mask_token") and value is not None}
    return environment().from_string(template).render(
        messages=messages, tools=None, documents=None,
        add_generation_prompt=add_generation_prompt, **names)


class Say(argparse.Action):
    """Keeps the order of --system, --user and --assistant."""

    def __call__(self, parser, namespace, value, option=None):
        namespace.messages.append({"role": option.lstrip("-"), "content": value})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", metavar="DIR", help="a model directory")
    for role in ("system", "user", "assistant"):
        parser.add_argument(f"--{role}", action=Say, metavar="TEXT",
                            help=f"a message of the {role}; - reads it from stdin")
    parser.add_argument("--no-generation-prompt", action="store_true",
                        help="end after the last message, not where the assistant is to begin")
    parser.set_defaults(messages=[])
    args = parser.parse_args()
    if not args.messages:
        parser.error("no --user")
    for message in args.messages:
        if message["content"] == "-":
            message["content"] = sys.stdin.read()
    try:
        import jinja2
    except ImportError:
        print("render_chat.py: needs jinja2: python3 -m pip install jinja2", file=sys.stderr)
        return 3
    try:
        text = render(args.directory, args.messages, not args.no_generation_prompt)
    except (LookupError, OSError, ValueError) as error:
        print(f"render_chat.py: {error}", file=sys.stderr)
        return 4
    except jinja2.exceptions.TemplateError as error:
        print(f"render_chat.py: the chat template: {error}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

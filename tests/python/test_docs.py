"""The examples of docs/python.md run."""

import re


def test_examples(root):
    text = (root / "docs" / "python.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    namespace = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), namespace)

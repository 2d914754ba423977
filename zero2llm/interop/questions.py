"""What an export is asked: texts that tokenizers disagree on, conversations, and the beginnings of answers."""

from __future__ import annotations

from zero2llm.interop.checks import Chat

TEXTS = (
    "Hello world! It's a test; we'll see, I'VE SAID 'so', they'Re 'tis Mr. O'Neill's e-mail's", "  leading", "trailing   ", " ", "   ", "",
    "\n\n\n", "a\n\nb\n \n c\r\n\r\nd\te\t\tf", "1 12 123 1234 12345 1234567890 3.14159 1,000,000 ½ ² Ⅷ ٣٤٥ 一二三", "  12 345  6", "a1b2c3 0xDEADBEEF 1e-10",
    "中文分词测试，这是一个例子。《红楼梦》第12回：“你好！”", "日本語のテキスト、カタカナ。", "한국어 문장입니다.", "ไทยภาษาไทย", "العربية هنا ١٢٣", "Привет, ЁЖИК",
    "naïve NAÏVE Straße œuvre camelCase XMLHttpRequest", "𐐀𐐨 𝒜𝓑 𠮷野家 🀄", "😀😃 👍🏽 🇩🇪",
    "def f(x):\n    if x > 0:\n\t\treturn {\"a\": [1, 2], 'b': x**2}\n    # comment\n\n\nclass A: pass",
    "for(int i=0;i<n;++i){a[i]&=~b[i]<<2;} // $x + ^y | `z` <=> ||", "https://example.com/a/b?c=d&e=f#g \\path\\to ~/.bashrc $HOME €5", "!!!???...;;; ((())) *** ### ---",
)  # fmt: skip
ODD = (  # composed or not, and other blanks than ASCII's: some formats cannot say how a tokenizer treats them, and our notes tell so
    "e\u0301cole cafe\u0301 A\u030a", "हिन्दी में एक वाक्य है।", "ﬁne ｆｕｌｌ　ｗｉｄｔｈ", "\u00a0nbsp\u2003em\u3000ideo\u200bzw\u2028ls", "Élan éÉcole ÀéÎ camelCaseÉté",
)  # fmt: skip
PROMPTS = (
    "The capital of France is", "Once upon a time there was a", "def fibonacci(n):\n    ", "春风又绿江南岸，", "1, 2, 3, 4,", "Dear Sir or Madam,\n\n",
    "The three laws of thermodynamics are:\n1.", "Il était une fois",
)  # fmt: skip

_say = lambda *turns: [{"role": role, "content": content} for role, content in turns]
_weather = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "Its name"}}, "required": ["city"]}}}  # fmt: skip
_call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}
_asked = [*_say(("user", "Weather in Beijing?")), {"role": "assistant", "content": "", "tool_calls": [_call]}]
_thought = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2 is 4."}
CHATS = (
    Chat(_say(("user", "hi"))),
    Chat(_say(("system", "Be brief."), ("user", "What is 2 + 2?"))),
    Chat(_say(("user", "a\n\nb"), ("assistant", "c"), ("user", "{{ x }} \"quoted\" <b>&amp;"))),
    Chat(_say(("system", "你是助手"), ("user", "春天"), ("assistant", "来了。"), ("user", "?"))),
    Chat(_say(("user", "Weather in Beijing?")), tools=[_weather]),
    Chat([*_say(("system", "Be brief.")), *_asked, {"role": "tool", "name": "get_weather", "content": "{\"sky\": \"clear\"}"}], tools=[_weather]),
    Chat([*_say(("user", "What is 2 + 2?")), _thought, *_say(("user", "And 3 + 3?"))]),
    Chat(_say(("user", "What is 2 + 2?")), names=(("enable_thinking", False),)),
)  # fmt: skip

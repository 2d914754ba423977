"""Ordinary words, each with its Chinese twin at the same index: content is indices, language is a lookup.

The English ones are frequent in nineteenth-century novels and the Chinese ones are single characters, so that a
vocabulary of 4,096 learned on a small corpus keeps most of them in one or two tokens. Few, so that a tiny model meets
each of them hundreds of times: what it must generalise to is new combinations.
"""

from __future__ import annotations

Words = tuple[tuple[str, str], ...]  # (English, Chinese)


def _pairs(text: str) -> Words:
    flat = text.split()
    return tuple(zip(flat[::2], flat[1::2], strict=True))


NAMES = _pairs("""
    Emma 王生 Jane 李生 Tom 张生 John 陈生 Mary 周生 Anne 吴生 Frank 徐生 Henry 孙生 Charles 朱生 Edward 胡生
    William 郭生 Harriet 何生 Fanny 曹生 Elizabeth 许生 Thomas 沈生 Catherine 杨生
""")

ANIMALS = _pairs("horse 马 dog 犬 bird 鸟 fish 鱼 sheep 羊 cow 牛 wolf 狼 deer 鹿")

OBJECTS = _pairs("book 书 knife 刀 stone 石 flower 花 wine 酒 tea 茶 harp 琴 coat 衣")

THINGS = ANIMALS + OBJECTS

PLACES = _pairs("garden 园 house 家 city 城 church 寺 ship 船 village 村 field 田 valley 谷")

COLOURS = _pairs("red 红 green 绿 white 白 black 黑 yellow 黄 purple 紫")

QUALITIES = _pairs("big 大 small 小 old 老 new 新 good 好 bad 坏")


def word(words: Words, index: int, lang: str) -> str:
    return words[index][lang == "zh"]

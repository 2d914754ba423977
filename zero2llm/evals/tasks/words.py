"""Ordinary words, each with its Chinese twin at the same index: content is indices, language is a lookup.

The English ones are frequent in nineteenth-century novels and the Chinese ones are single characters, so that a
vocabulary of 4,096 learned on a small corpus keeps most of them in one or two tokens.
"""

from __future__ import annotations

Words = tuple[tuple[str, str], ...]  # (English, Chinese)


def _pairs(text: str) -> Words:
    flat = text.split()
    return tuple(zip(flat[::2], flat[1::2], strict=True))


NAMES = _pairs("""
    Emma 王生 Jane 李生 Tom 张生 John 陈生 Mary 周生 Anne 吴生 Frank 徐生 Henry 孙生 Charles 朱生 Edward 胡生
    William 郭生 Harriet 何生 Fanny 曹生 Elizabeth 许生 Thomas 沈生 Catherine 杨生 Lydia 赵生 Maria 刘生
    Julia 郑生 Lucy 韩生
""")

ANIMALS = _pairs("horse 马 dog 犬 bird 鸟 fish 鱼 sheep 羊 cow 牛 cat 猫 wolf 狼 pig 猪 deer 鹿")

OBJECTS = _pairs("""
    book 书 knife 刀 sword 剑 flower 花 stone 石 money 钱 wine 酒 tea 茶 harp 琴 bow 弓 coat 衣 lamp 灯 flag 旗
    pen 笔 hat 帽
""")

THINGS = ANIMALS + OBJECTS

PLACES = _pairs("""
    garden 园 house 家 city 城 church 寺 ship 船 village 村 street 街 market 市 field 田 tower 塔 hall 堂
    cave 洞 shop 店 valley 谷
""")

COLOURS = _pairs("red 红 blue 蓝 green 绿 white 白 black 黑 yellow 黄 grey 灰 purple 紫")

QUALITIES = _pairs("big 大 small 小 old 老 new 新 good 好 bad 坏")


def word(words: Words, index: int, lang: str) -> str:
    return words[index][lang == "zh"]

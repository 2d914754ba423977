"""Lines that pages repeat and nobody wrote for the reader: cookie notices, menus, share buttons, imprints, placeholders.

A line goes if it is no longer than ``max_line`` and, without the signs around it, is one of a list of phrases ("Read more", "上一篇") or matches
a pattern: in full where prose uses the words too, anywhere where it does not ("lorem ipsum dolor", "京ICP备12345678号"). Sentences
that end in a full stop are no menu entries. All other lines stay to the byte.

Source: handwritten lists; the kinds follow what C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2: javascript, lorem ipsum, cookie
policies) and RefinedWeb (Penedo et al. 2023, arXiv 2306.01116, appendix G.2: social counters, navigation) remove.
Why: such lines are the most repeated text of the web and are learned by heart first. Costs 14 to 45 MB/s.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from zero2llm.core.config import config
from zero2llm.data.document import Document, Removed, Step

Name = Literal["cookies", "script", "placeholder", "copyright", "navigation", "sharing", "account", "advert"]

PHRASES = {
    "cookies": """accept cookies|accept all cookies|accept all|reject all|reject cookies|allow cookies|allow all cookies|manage cookies
        |cookie policy|cookie settings|cookie preferences|cookie notice|接受cookie|接受所有cookie|接受全部cookie|拒绝cookie|管理cookie|cookie设置""",
    "placeholder": "此处填写内容|此处输入文字|此处输入文本|这里输入内容|这里插入文字|在此输入内容",
    "copyright": """terms of use|terms of service|terms and conditions|privacy policy|privacy notice|legal notice|imprint|all rights reserved
        |免责声明|隐私政策|用户协议|服务条款|法律声明""",
    "navigation": """home page|homepage|back to top|go to top|skip to content|skip to main content|main menu|toggle navigation|site map|sitemap
        |read more|continue reading|view more|show more|load more|see all|view all|learn more|click here|next page|previous page
        |next post|previous post|next article|previous article|older posts|newer posts|related posts|related articles|you may also like
        |recent posts|recent comments|most popular|breadcrumb|breadcrumbs|about us|contact us|首页|首頁|返回首页|返回顶部|返回目录|返回列表
        |返回上一页|回到顶部|网站地图|网站首页|点击查看|点击查看更多|点击阅读全文|点击更多|阅读全文|阅读原文|阅读更多|查看更多|查看全部|查看详情|查看原文
        |更多>>|加载更多|展开全文|相关阅读|相关文章|相关推荐|相关新闻|相关链接|猜你喜欢|热门推荐|热门文章|热门标签|推荐阅读|友情链接|联系我们|关于我们
        |上一篇|下一篇|上一页|下一页|上一章|下一章|上一頁|下一頁|上一篇没有了|下一篇没有了|设为首页|加入收藏""",
    "sharing": """share this|share this post|share this article|share on facebook|share on twitter|share on x|share via email|tweet this|pin it
        |email this|print this|follow us|like us on facebook|leave a reply|leave a comment|post a comment|no comments|no comments yet
        |分享|分享到|分享至|转发|点赞|打赏|举报|发表评论|我要评论|写评论|暂无评论|扫一扫分享|扫码分享""",
    "account": """log in|login|log out|logout|sign in|sign up|sign out|create an account|create your account|forgot password
        |forgot your password|my account|subscribe now|unsubscribe|remember me|log in or register|sign in or register|sign in or sign up
        |登录|登陆|注册|登录注册|登录/注册|登录|免费注册|立即注册|忘记密码|退出登录|用户登录|会员登录|记住我|立即订阅|请先登录""",
    "advert": """advertisement|advertisements|advertising|sponsored|sponsored content|sponsored links|add to cart|add to basket|add to wishlist
        |buy now|shop now|free shipping|广告|廣告|赞助商链接|加入购物车|立即购买|立即下载|点击下载""",
}

NETWORKS = "facebook|twitter|x|linkedin|pinterest|whatsapp|instagram|youtube|reddit|telegram|weibo|tiktok|e-?mail|and|or|on|via"
CHINESE_NETWORKS = "微信|微博|新浪微博|朋友圈|qq|qq空间|豆瓣|人人网|贴吧"
# (rule, words without which the pattern cannot match, pattern); lines come in small letters
PATTERNS = (
    ("cookies", ("cookie",), r"\b(?:site|website|we|continuing)\b.{0,80}\b(?:use|uses|using|accept)\b.{0,40}\bcookies\b"),
    ("cookies", ("cookie",), r"(?:本网站|本站|我们).{0,20}使用.{0,10}cookie"),
    ("script", ("script",), r"\b(?:enable|turn on|activate|requires?|need)\b.{0,40}\bjava ?script\b"),
    ("script", ("script",), r"\bjava ?script\b.{0,30}\b(?:disabled|turned off|not enabled|required|must be enabled)\b"),
    ("script", ("browser",), r"\byour browser (?:does not|doesn't) support\b"),
    ("script", ("script",), r"(?:启用|開啟|啟用|打开|开启).{0,10}java ?script"),
    ("script", ("浏览器",), r"[您你]的浏览器.{0,15}(?:不支持|版本过低)"),
    ("placeholder", ("lorem",), r"\blorem ipsum dolor\b"),
    ("copyright", ("©", "(c)", "copyright"), r"^(?:copyright\b.{0,5})?(?:©|\(c\)|copyright).{0,5}\b(?:19|20)\d\d\b"),
    ("copyright", ("reserved",), r"\ball rights reserved\.?$"),
    ("copyright", ("所有",), r"版[权權]所有"),
    ("copyright", ("icp",), r"icp[备证]?.{0,3}\d{5,12}"),
    ("copyright", ("网安备",), r"公网安备.{0,3}\d{6,20}"),
    ("copyright", ("转载", "轉載", "复制"), r"^未[经經].{0,12}(?:授权|许可|允许|授權|許可|同意).{0,8}(?:不得|禁止|请勿|請勿).{0,10}(?:转载|轉載|复制)"),
    ("copyright", ("编辑",), r"^责任编辑 ?[:：].{1,20}$"),
    ("navigation", (">", "»", "›"), r"^(?:home|首页|首頁)(?: ?[>»›]{1,2} ?[^>»›]{1,40}){1,6}$"),
    ("navigation", ("上一", "下一"), r"^[上下]一[篇页章则条頁] ?[:：].{0,60}$"),
    ("navigation", ("位置",), r"^(?:当前位置|您(?:现在)?的位置) ?[:：].{0,60}$"),
    ("navigation", ("page ",), r"^page \d{1,4} of \d{1,4}$"),
    ("navigation", ("页",), r"^第 ?\d{1,4} ?页[ ,，/]{0,3}共 ?\d{1,4} ?页$"),
    ("sharing", ("share", "follow", "like", "find us"), rf"^(?:share|follow us|like us|find us)(?:[ ,|/&:]{{1,3}}(?:{NETWORKS})){{2,10}}$"),
    ("sharing", ("like", "share", "comment", "view", "tweet", "follower", "repl"), r"^\d{1,7}(?:[.,]\d{1,3})?[km]? (?:likes?|shares?|comments?|views?|retweets?|followers?|replies|reply)$"),
    ("sharing", ("分享",), rf"^分享[到至]?(?:[:：、,，| ]{{0,2}}(?:{CHINESE_NETWORKS})){{1,10}}$"),
    ("sharing", ("扫一扫", "公众号"), r"^.{0,6}(?:扫一扫.{0,20}|(?:扫码|长按.{0,8})?关注.{0,16}公众号.{0,20})$"),
    ("sharing", ("读", "论", "赞", "览", "藏", "发", "击"), r"^\d{1,8} ?[人次]?(?:阅读|评论|点赞|赞|浏览|收藏|转发|赞同)$"),
    ("sharing", ("读", "论", "赞", "览", "藏", "发", "击"), r"^(?:阅读|评论|点赞|浏览|点击|收藏)[量数次]{0,2} ?[:：(（] ?\d{1,8}[)）]?$"),
    ("account", ("newsletter", "mailing list"), r"^(?:subscribe to|sign up for|join) (?:our|the|my) (?:\w{1,12} )?(?:newsletter|mailing list)\b"),
    ("advert", ("sponsored by", "ads by"), r"^(?:sponsored|ads) by [\w ]{1,30}$"),
)  # fmt: skip
PHRASE_RULE = {phrase.strip(): name for name, phrases in PHRASES.items() for phrase in phrases.split("|")}
COMPILED = tuple((name, hints, re.compile(pattern)) for name, hints, pattern in PATTERNS)
OUTER = " \t\u3000»›→←«‹>…|·•*#-–—_[]【】"
DOTS = re.compile(r"\.{3,6}$")

Active = list[tuple[str, tuple[str, ...], re.Pattern[str]]]


@config
class BoilerplateConfig:
    """``rules``: which lists to use. ``max_line``: in characters; a longer line is prose."""

    kind: Literal["boilerplate"] = "boilerplate"
    looks_at: ClassVar[str] = "document"
    rules: tuple[Name, ...] = (
        "cookies",
        "script",
        "placeholder",
        "copyright",
        "navigation",
        "sharing",
        "account",
        "advert",
    )
    max_line: int = 200

    def __post_init__(self):
        known = dict.fromkeys([*PHRASES, *(name for name, _, _ in PATTERNS)])
        if not self.rules or any(name not in known for name in self.rules):
            raise ValueError(f"rules = {list(self.rules)}: choose from {', '.join(known)}")
        if self.max_line < 1:
            raise ValueError(f"max_line = {self.max_line} must be at least 1")

    def build(self) -> Step:
        phrases = {phrase: name for phrase, name in PHRASE_RULE.items() if name in self.rules}
        patterns = [entry for entry in COMPILED if entry[0] in self.rules]

        def step(doc: Document) -> Document | Removed:
            small = doc.text.lower()
            active = [entry for entry in patterns if any(hint in small for hint in entry[1])]
            lines = doc.text.split("\n")
            found = [rule_of(line, phrases, active) if len(line) <= self.max_line else None for line in lines]
            names = [name for name in found if name]
            if not names:
                return doc
            text = "\n".join(line for line, name in zip(lines, found, strict=True) if not name).strip("\n")
            if not text.strip():
                return Removed("only boilerplate", ", ".join(dict.fromkeys(names)))
            doc.text = text
            for name in names:
                doc.notes[f"lines: {name}"] += 1
            return doc

        return step


def rule_of(line: str, phrases: dict[str, str], patterns: Active) -> str | None:
    """The first rule that takes the line for boilerplate."""
    small = DOTS.sub("", line.strip(OUTER).lower())
    if small in phrases:
        return phrases[small]
    for name, hints, pattern in patterns:
        if any(hint in small for hint in hints) and pattern.search(small):
            return name
    return None

"""The built-in table: invented product names in Chinese and English, drawn from a small grammar.

The file has the same bytes on every machine: it is drawn with `random.Random.random`, whose sequence for a seed does
not change between versions of Python.
"""

import csv
import io
import random
import re
from collections.abc import Sequence
from pathlib import Path

from lit_gpt.files import atomic_write

SAMPLE_FILE = "data/mingcheng.csv"  # the file name of the course; mingcheng means name
SAMPLE_COLUMN = "name"  # the column to train on
NUM_ROWS = 20_000

CHINESE_BRANDS = (
    "云雀 青禾 海棠里 木白 拾光 北岭 南枝 晴川 松果屋 星野 小满 山与 半夏 鹿鸣 知夏 溪谷 暖冬 朴田 长风 白鹭"
)
ENGLISH_BRANDS = (
    "Norvale|Kestwick|Lumora|Brambley|Osterly|Tindale|Ferrowen|Aldermoor|Pinehollow|Quillon|Marrowby|Solvane"
    "|Wetherfen|Corravel|Haldane & Moss|Ivoryn|Juniper & Fell|Larkstead|Mistwood|Ravello"
)

# category: (lowest and highest price in yuan), (qualities, products, details) in Chinese, the same in English
CATEGORIES: dict[str, tuple[tuple[int, int], tuple[str, str, str], tuple[str, str, str]]] = {
    "kitchen": (
        (19, 899),
        (
            "不粘 304不锈钢 加厚 陶瓷 家用 便携 大容量 北欧风 玻璃 双层 可微波 日式",
            "炒锅 保温杯 电饭煲 菜刀 砧板 汤锅 餐具套装 水壶 保鲜盒 咖啡壶 烤盘 便当盒",
            "500ml 1.8L 28cm 两只装 四件套 带盖 礼盒装 经典款 升级款 灰色 米白色 原木色",
        ),
        (
            "Nonstick|Cast-Iron|Stainless Steel|Ceramic|Compact|Insulated|Hand-Forged|Glass|Bamboo|Enamelled",
            "Frying Pan|Travel Mug|Rice Cooker|Chef's Knife|Cutting Board|Stock Pot|Kettle|Storage Jar|Coffee Press"
            "|Baking Tray|Lunch Box|Mixing Bowl",
            "500 ml|1.8 L|28 cm|Set of 2|Set of 4|with Lid|Gift Box|Slate Grey|Cream White|Natural Oak",
        ),
    ),
    "clothing": (
        (29, 699),
        (
            "纯棉 宽松 修身 春秋 夏季薄款 加绒 复古 休闲 亚麻 高腰 防晒 针织",
            "T恤 连衣裙 牛仔裤 卫衣 衬衫 外套 半身裙 羽绒服 运动裤 毛衣 风衣 睡衣套装",
            "女款 男款 情侣款 儿童 黑色 藏青色 浅蓝色 S-XL 加大码 短袖 长袖 圆领",
        ),
        (
            "Organic Cotton|Relaxed|Slim-Fit|Lightweight|Fleece-Lined|Vintage|Linen|High-Waist|Merino|Quilted",
            "T-Shirt|Summer Dress|Jeans|Hoodie|Oxford Shirt|Jacket|Midi Skirt|Down Coat|Joggers|Sweater|Trench Coat"
            "|Pyjama Set",
            "for Women|for Men|for Kids|Black|Navy|Sky Blue|Plus Size|Short Sleeve|Long Sleeve|Crew Neck",
        ),
    ),
    "electronics": (
        (39, 4999),
        (
            "无线 降噪 快充 蓝牙 智能 超薄 高清 桌面 迷你 防水 磁吸 长续航",
            "耳机 充电宝 音箱 键盘 鼠标 台灯 手环 投影仪 摄像头 加湿器 吹风机 平板支架",
            "Pro 青春版 10000毫安 65W 第二代 白色 深空灰 带收纳盒 USB-C接口 静音版 旗舰款 mini",
        ),
        (
            "Wireless|Noise-Cancelling|Fast-Charging|Bluetooth|Smart|Ultra-Slim|HD|Magnetic|Waterproof|Foldable",
            "Headphones|Power Bank|Speaker|Keyboard|Mouse|Desk Lamp|Fitness Band|Projector|Webcam|Humidifier"
            "|Hair Dryer|Tablet Stand",
            "Pro|Lite|10,000 mAh|65 W|Gen 2|White|Space Grey|with Case|USB-C|Silent Edition",
        ),
    ),
    "food": (
        (9, 399),
        (
            "有机 手工 低糖 原味 云南 东北 新鲜 独立包装 冷萃 五香 古法 高山",
            "绿茶 坚果 咖啡豆 蜂蜜 月饼 面条 大米 牛肉干 果脯 辣椒酱 酸奶 燕麦片",
            "250g 500g 1kg 10包 礼盒 家庭装 试吃装 12罐 尝鲜装 罐装 袋装 整箱",
        ),
        (
            "Organic|Handmade|Low-Sugar|Original|Highland|Smoked|Fresh|Cold-Brew|Roasted|Wild",
            "Green Tea|Mixed Nuts|Coffee Beans|Honey|Shortbread|Noodles|Basmati Rice|Beef Jerky|Dried Mango"
            "|Chilli Sauce|Yoghurt|Granola",
            "250 g|500 g|1 kg|Pack of 10|Gift Box|Family Size|Taster Pack|12 Cans|Jar|Pouch",
        ),
    ),
    "outdoors": (
        (25, 2599),
        (
            "折叠 轻量 户外 双人 防风 防潮 专业 碳纤维 速干 便携式 四季 加厚",
            "帐篷 登山杖 睡袋 背包 露营灯 野餐垫 钓鱼椅 保温箱 头灯 水袋 天幕 冲锋衣",
            "2人 40L 1.5kg 军绿色 橙色 带收纳袋 三季款 自动款 可充电 加宽 家庭款 徒步款",
        ),
        (
            "Folding|Ultralight|Two-Person|Windproof|Padded|Carbon|Quick-Dry|Four-Season|Rugged|Packable",
            "Tent|Trekking Poles|Sleeping Bag|Backpack|Camp Lantern|Picnic Blanket|Camp Chair|Cool Box|Head Torch"
            "|Water Bladder|Tarp|Rain Jacket",
            "40 L|1.5 kg|Olive|Orange|with Sack|3-Season|Pop-Up|Rechargeable|Wide|Trail Edition",
        ),
    ),
}


def generate_rows(num_rows: int = NUM_ROWS, seed: int = 20240601) -> list[tuple[int, str, str, str]]:
    """Return rows `(id, name, category, price)`, no name twice, about 60% of the names in Chinese."""
    generator = random.Random(seed)

    def choose(choices: Sequence[str]) -> str:
        return choices[int(generator.random() * len(choices))]

    rows: list[tuple[int, str, str, str]] = []
    used_names: set[str] = set()
    while len(rows) < num_rows:
        category = choose(list(CATEGORIES))
        (lowest, highest), chinese, english = CATEGORIES[category]
        if generator.random() < 0.6:
            quality, product, detail = (choose(words.split()) for words in chinese)
            name = f"{choose(CHINESE_BRANDS.split())} {quality}{product} {detail}"
        else:
            quality, product, detail = (choose(words.split("|")) for words in english)
            name = f"{choose(ENGLISH_BRANDS.split('|'))} {quality} {product}, {detail}"
        price = lowest * (highest / lowest) ** generator.random()  # log-uniform
        if name not in used_names:
            used_names.add(name)
            rows.append((len(rows) + 1, name, category, f"{price:.2f}"))
    return rows


def name_pattern() -> re.Pattern[str]:
    """Return the pattern of all names that `generate_rows` can draw: what a model of the table has learnt from it."""

    def one_of(words: Sequence[str]) -> str:
        return "(?:" + "|".join(map(re.escape, words)) + ")"

    patterns = []
    for _, chinese, english in CATEGORIES.values():
        quality, product, detail = (one_of(words.split()) for words in chinese)
        patterns.append(f"{one_of(CHINESE_BRANDS.split())} {quality}{product} {detail}")
        quality, product, detail = (one_of(words.split("|")) for words in english)
        patterns.append(f"{one_of(ENGLISH_BRANDS.split('|'))} {quality} {product}, {detail}")
    return re.compile("|".join(patterns))


def write_sample(path: Path) -> None:
    """Write the table to a CSV file in UTF-8 with `\\n` line ends, atomically.

    Raises:
        OSError: The file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "name", "category", "price"))
    writer.writerows(generate_rows())
    atomic_write(path, lambda file: file.write(text.getvalue().encode("utf-8")))


def is_sample(files: list[str] | str) -> bool:
    """Return whether `files` is the built-in table and nothing else."""
    return [Path(file) for file in ([files] if isinstance(files, str) else files)] == [Path(SAMPLE_FILE)]

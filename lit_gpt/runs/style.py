"""The style sheet of report.html, for light and dark screens from 390 pixels on."""

STYLE = """
:root{--bg:#fff;--fg:#1c1e21;--soft:#5f6670;--line:#dfe2e6;--box:#f5f6f8;--train:#1f6fd1;--val:#d2620a;--good:#1a7f37;
--warn:#9a6700;--bad:#c62828}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--fg:#e6e8ea;--soft:#9aa3ad;--line:#32373d;--box:#1e2125;
--train:#6cabf5;--val:#f0954a;--good:#57c273;--warn:#d9a940;--bad:#f07a72}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:20px 16px 60px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:32px 0 8px}
header p{margin:2px 0 16px;color:var(--soft);overflow-wrap:anywhere}
.status{font-size:.8rem;font-weight:600;vertical-align:middle;padding:2px 9px;border:1px solid;border-radius:10px}
.finished{color:var(--good)}.stopped,.running{color:var(--warn)}.failed{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:10px}
.tile{background:var(--box);border-radius:8px;padding:9px 12px}
.tile div,.tile small{color:var(--soft);font-size:.8rem;display:block;overflow-wrap:anywhere}.tile b{font-size:1.2rem}
pre{background:var(--box);border-radius:8px;padding:10px 12px;margin:10px 0;white-space:pre-wrap;overflow-wrap:anywhere;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Noto Sans Mono","Noto Sans Mono CJK SC",monospace}
.sample{margin:4px 0;padding:6px 12px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:20px}
figure{margin:0}figcaption{font-size:.9rem;color:var(--soft)}figcaption b{color:var(--fg)}
svg{width:100%;height:auto;display:block}svg text{font-size:11px;fill:var(--soft)}
.grid{stroke:var(--line);stroke-width:1}
polyline{fill:none;stroke-width:1.7;stroke-linejoin:round;vector-effect:non-scaling-stroke}
polyline.train{stroke:var(--train)}polyline.val{stroke:var(--val)}polyline.faint{stroke:var(--train);opacity:.35}
circle.train,circle.faint{fill:var(--train)}circle.val{fill:var(--val)}
circle.mark{fill:none;stroke:var(--val);stroke-width:1.7}
.key{margin-left:12px;white-space:nowrap}.key::before{content:"";display:inline-block;width:16px;height:3px;
margin-right:5px;vertical-align:middle;background:var(--train)}
.key.val::before{background:var(--val)}.key.faint::before{opacity:.35}
.key.mark::before{width:9px;height:9px;border:2px solid var(--val);border-radius:50%;background:none}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;min-width:min(100%,480px)}
th,td{text-align:left;vertical-align:top;padding:4px 14px 4px 0;border-bottom:1px solid var(--line)}
td{overflow-wrap:anywhere;font-variant-numeric:tabular-nums}th{font-weight:500;color:var(--soft);overflow-wrap:anywhere}
details{margin:8px 0}summary{cursor:pointer;color:var(--soft)}
@media print{details:not([open])>*{display:none}}
"""

"""The style sheet of the report, light and dark."""

__all__ = ["STYLE"]

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--muted:#66707c;--line:#e3e7ec;--page:#f6f7f9;
--card:#fff;--note:#fff7e0;--noteline:#e0b93a}
@media (prefers-color-scheme:dark){:root{--ink:#e8ebef;--muted:#98a2ae;--line:#2c323a;
--page:#14171a;--card:#1c2024;--note:#2b2613;--noteline:#8a7326}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:18px;margin:0 0 14px;letter-spacing:-.01em}
p{margin:0 0 12px}
.muted{color:var(--muted)}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px;
margin-top:20px}
.note{background:var(--note);border-left:3px solid var(--noteline);border-radius:6px;
padding:10px 14px;margin:12px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin-top:20px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px;
display:flex;flex-direction:column}
.tile b{font-size:25px;line-height:1.3;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile span{color:var(--muted);font-size:13px}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:20px}
figure{margin:0}
svg text{font-family:inherit;fill:var(--ink)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin:6px 0 14px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;
vertical-align:-1px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:6px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:500}
thead th{color:var(--muted);font-size:13px;font-weight:500}
tr>:first-child,.text{text-align:left}
.total th,.total td{font-weight:650;border-bottom:none}
details{margin-top:12px}
summary{cursor:pointer;color:var(--muted)}
ul{padding-left:20px;margin:8px 0}
pre{overflow-x:auto;font-size:13px;line-height:1.45;background:var(--page);
border:1px solid var(--line);border-radius:8px;padding:12px}
.picture{margin-top:18px}
.picture div{background:var(--picture);border-radius:10px;padding:6px;margin-top:8px;
text-align:center}
.picture img{max-width:100%;height:auto;display:block;margin:0 auto}
.legend .line{background:none;border:2px solid var(--muted)}
.legend .fill{background:var(--muted);opacity:.6}
.badge{border:1px solid var(--line);border-radius:20px;padding:1px 9px;font-size:12px;
margin:0 4px;color:var(--muted)}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""

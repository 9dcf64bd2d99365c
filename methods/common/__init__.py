"""What methods are made of; no method is in here.

Bases to derive from: `evicting`, `ragged`, `offloading`, `reselecting`, `reviving`. What tokens are rated and chosen
with: `scores`, `blocks`, `paging`, `schedule`, `future`. Where they wait: `active_blocks`, `aux_cache`, `host_store`.
"""

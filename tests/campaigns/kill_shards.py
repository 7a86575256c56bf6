"""Kill processes that embed shards of one source, at random moments: nothing may be lost, and nothing doubled.

    python tests/campaigns/kill_shards.py --trials 200

Each trial starts two to four processes on one store, of which some may have the same shard, and kills each at a moment
of its own. So fragments are staged and never told of, staged and not committed, committed and not marked as such. Then
one process that is left alone has to end with the store that nobody disturbed, bit for bit. It forks, as `kill_embed`.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch
from kill_embed import Campaign, compare, look
from trials import child, end, finished, run_trials

from lamplit.store.embed import unit_embedding
from lamplit.store.embed.embedding import embed
from lamplit.towers.images.image_tower import open_image_tower

UNIT = 4  # images
SHARDS = 2


class ShardCampaign(Campaign):
    """The images, a store that nobody disturbed, and how long it took."""

    def trial(self, number: int) -> bool:
        """Start, kill, look, go on, compare; tell whether all was right."""
        out, source = self.folder / f"{number}.lance", self.folder / "all"
        is_new = self.chance.random() < 0.7
        if not is_new:
            shutil.copytree(self.part, out)
        right = True
        for _ in range(2):
            # Without the first two, processes that have one shard together.
            shards = [0, 1, *self.chance.choices(range(SHARDS), k=2)][self.chance.choice((0, 2)) :]
            started = [child(embed_part, source, out, (shard, SHARDS)) for shard in shards]
            waits = sorted(self.chance.random() * 2 * self.seconds for _ in started)
            began = time.monotonic()
            for wait, process in zip(waits, started, strict=True):
                time.sleep(max(0.0, began + wait - time.monotonic()))
                self.killed += os.waitpid(process, os.WNOHANG) == (0, 0) and end(process)
            right = right and finished(child(look, out, self.whole))
        right = right and finished(child(embed_part, source, out, (0, 1)))
        right = right and finished(child(compare, out, self.whole))
        kind = f"{'new' if is_new else 'old'} store, killed after {', '.join(f'{wait:.2f}' for wait in waits)} s"
        print(f"trial {number}: {kind}: {'right' if right else 'WRONG'}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
        return right


def embed_part(source: Path, out: Path, shard: tuple[int, int]) -> None:
    """Embed a shard, with a commit after every unit."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unit_embedding.COMMIT_SECONDS = 0.0
    tower = open_image_tower("timm:test_vit", weights="random")
    embed(source, out, image_tower=tower, backend="torch", batch_size=4, shard=shard, unit_rows=UNIT)


if __name__ == "__main__":
    run_trials(ShardCampaign, 200)

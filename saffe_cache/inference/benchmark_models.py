"""A trained run as the models that benchmark libraries expect: `mteb` 2 and `CLIP_benchmark`.

The only importer of mteb and clip_benchmark, together with `benchmark_scores`. Texts become g(text), pictures
f(x, null), and documents or queries with both f(x, text). The run takes no prompts or instructions, so that both
libraries' numbers are those of its vectors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saffe_cache.retrieval.index import RetrievalIndex, build_index

if TYPE_CHECKING:
    from saffe_cache.inference.model import TrainedFusion


class MtebModel:
    """mteb's EncoderProtocol, and its SearchProtocol for retrieval, where the gallery is encoded once and indexed.

    mteb.evaluate(MtebModel(load_run("runs/saffe")), mteb.get_tasks(["Flickr30kT2IRetrieval"]))
    """

    def __init__(self, run: TrainedFusion) -> None:
        from mteb.models import ModelMeta, SearchEncoderWrapper

        self.run = run
        self.last_encoded = "", ""  # split and subset
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=f"saffe_cache/{run.folder.name}",
            revision=run.fingerprint,
            release_date=None,
            languages=None,
            n_parameters=sum(one.numel() for one in run.model.parameters()),
            memory_usage_mb=None,
            max_tokens=None,
            embed_dim=run.size,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name="cosine",
            use_instructions=False,
            training_datasets=None,
            modalities=["text", run.media[0]],
        )
        self._search = SearchEncoderWrapper(self, index_backend=_Gallery())

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, hf_split: str = "", hf_subset: str = "", **_: Any
    ) -> np.ndarray:
        """Unit vectors, float32 [n, d], of a data loader's batches; further arguments of the protocol change nothing.

        Raises:
            ValueError: an input has both a picture and a text, and no text enters the fusion; or it cannot be read.
        """
        self.last_encoded = hf_split, hf_subset
        return np.concatenate([self._encode_batch(batch) for batch in inputs])

    def _encode_batch(self, batch: Mapping[str, Any]) -> np.ndarray:
        texts, media = batch.get("text"), batch.get(self.run.media[0])
        if media is None:
            if texts is None:
                raise ValueError(f"benchmark: found columns {', '.join(batch)}, expected text or {self.run.media[0]}.")
            return self.run.embed_texts(list(texts))
        if self.run.media[0] == "audio":
            media = [{"array": _mono(one["array"]), "sampling_rate": one["sampling_rate"]} for one in media]
        if texts is not None:
            return self.run.embed_pairs(list(media), list(texts))
        embed = {"image": "embed_images", "audio": "embed_audio", "video": "embed_videos"}[self.run.media[0]]
        vectors: np.ndarray = getattr(self.run, embed)(list(media))
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of all pairs [n, m]."""
        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines [n] of row i with row i."""
        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(dim=-1)

    def index(self, corpus: Any, **arguments: Any) -> None:
        """Encode and index a corpus."""
        self._search.index(corpus, **arguments)

    def search(self, queries: Any, **arguments: Any) -> dict[str, dict[str, float]]:
        """Scores of each query's best documents."""
        return self._search.search(queries, **arguments)  # type: ignore[no-any-return]


def _mono(waveform: Any) -> np.ndarray:
    """Samples [n] of one channel; of [channels, n] their mean, as mteb's own models take it."""
    samples = np.asarray(waveform, np.float32)
    return samples if samples.ndim == 1 else samples.mean(axis=0)


class _Gallery:
    """mteb's IndexEncoderSearchProtocol: the index that an evaluation of saffe_cache writes, exact."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._vectors: list[np.ndarray] = []
        self._ids: list[str] = []
        self._index: RetrievalIndex | None = None

    def add_documents(self, embeddings: Any, idxs: Sequence[str]) -> None:
        self._vectors.append(np.asarray(embeddings, np.float32))
        self._ids += idxs
        self._index = None

    def search(
        self,
        embeddings: Any,
        top_k: int,
        similarity_fn: Callable[[Any, Any], Any],
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        query_idx_to_id: Mapping[int, str] | None = None,
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Scores and places of each query's best documents; with `top_ranked`, places among its candidates."""
        queries, vectors = np.asarray(embeddings, np.float32), np.concatenate(self._vectors)
        if top_ranked is not None and query_idx_to_id is not None:
            rows = {name: row for row, name in enumerate(self._ids)}
            candidates = [[rows[one] for one in top_ranked.get(query_idx_to_id[i], ())] for i in range(len(queries))]
            scores = [vectors[listed] @ query for listed, query in zip(candidates, queries, strict=True)]
            places = [np.argsort(-one, kind="stable")[:top_k] for one in scores]
            return [one[best].tolist() for one, best in zip(scores, places, strict=True)], [p.tolist() for p in places]
        if self._index is None:
            self._index = build_index(vectors, tuple(self._ids))
        found = np.concatenate(list(self._index.rank(queries, min(top_k, len(vectors)))))
        exact = [vectors[row] @ query for row, query in zip(found, queries, strict=True)]
        return [one.tolist() for one in exact], found.tolist()


class OnAnyDevice(list[Any]):
    """A batch of pictures or texts where CLIP_benchmark expects a tensor: the run moves them itself."""

    def to(self, device: str) -> OnAnyDevice:
        return self


class ClipBenchmarkModel:
    """What CLIP_benchmark's functions take as a model; its tokenizer is `OnAnyDevice`, its images `OnAnyDevice` lists.

    It keeps the vectors that it returned, for each call in order, since the library returns no scores of queries.
    """

    def __init__(self, run: TrainedFusion) -> None:
        self.run = run
        self.images: list[np.ndarray] = []
        self.texts: list[np.ndarray] = []

    def encode_image(self, images: Sequence[Any]) -> torch.Tensor:
        self.images.append(self.run.embed_images(list(images)))
        return torch.from_numpy(self.images[-1])

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        self.texts.append(self.run.embed_texts(list(texts)))
        return torch.from_numpy(self.texts[-1])

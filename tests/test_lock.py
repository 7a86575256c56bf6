from __future__ import annotations

def test_probe(store, text_folder, pictures):
    from lamplit import open_text_tower
    t = open_text_tower(f"hf:{text_folder}", width=64)
    ids = t.tokenize(["A small red circle.", "schwarz, groß: Kreuz"])
    print(ids, t.tokenizer.convert_ids_to_tokens(ids[0]), t.tokenizer.convert_ids_to_tokens(ids[1]), t.context_length, t.pooling)
    print(t(ids).shape, len(store), store.metadata_columns, store.vectors().std(0).mean())
    print(store.engine, store.rows([0]))

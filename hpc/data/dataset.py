"""TEMP integration draft."""
from __future__ import annotations
from dataclasses import dataclass
import random
import torch
from hpc.config import Config
from hpc.data.collate import Batch, collate, make_row, prompt_ids, answer_ids, Row
from hpc.data import tasks
from hpc.data.ward_notes import ward_notes

@dataclass(kw_only=True, frozen=True)
class EvalBatch(Batch):
    gold: tuple[int, ...]
    group: int
def load_client_data(config, client_id, tokenizer):
    return ClientData(config, client_id, tokenizer)
class ClientData:
    def __init__(self, config, client_id, tok):
        self.c=config; self.k=client_id
        t=tasks.FORMATS["ward_notes"]
        def ex(split,n):
            return [tasks.make_example(t,r,"x") for r in ward_notes(site=client_id,sites=config.train.clients,split=split,count=n,seed=config.train.seed)]
        d=config.data
        kw=dict(max_source_length=d.max_source_length,max_target_length=d.max_target_length)
        self.rows=[make_row(e,tok,**kw) for e in ex("train",d.train_examples)]
        self.val=[(e,[Row(ids=(p:=prompt_ids(e,tok,d.max_source_length))+answer_ids(e,a,tok,d.max_target_length),prompt_len=len(p)) for a in e.verbalisers]) for e in ex("val",d.val_examples)]
    def train_batch(self, step):
        b=self.c.train.per_client_batch_size
        idx=[]
        for j in range(step*b,(step+1)*b):
            ep,pos=divmod(j,len(self.rows))
            perm=list(range(len(self.rows))); random.Random(f"{self.c.train.seed}:{self.k}:{ep}").shuffle(perm)
            idx.append(perm[pos])
        return collate([self.rows[i] for i in idx])
    def eval_batches(self, n):
        out=[]
        for i in range(0,len(self.val),max(1,n//2)):
            chunk=self.val[i:i+max(1,n//2)]
            b=collate([r for _,rs in chunk for r in rs])
            out.append(EvalBatch(**vars(b),gold=tuple(e.label for e,_ in chunk),group=2))
        return out
def score_eval(batch, logits_LV):
    lp=logits_LV.log_softmax(-1)[torch.arange(len(batch.label_ids_L)),batch.label_ids_L]
    s=torch.zeros(len(batch.lengths)).index_add_(0,batch.label_rows_L,lp).view(-1,2)
    # index 0 = No, 1 = Yes
    pred=s.argmax(1).tolist()
    return sum(int(p==g) for p,g in zip(pred,batch.gold)),len(batch.gold),pred

# ruff: noqa
"""Does the toy captioner read true labels, or pictures at all? Run once for README; needs out/prism.pt.

    python captions.py ARM STEPS BATCH LR SEED [pre=STEPS pb=BATCH plr=LR save=FILE load=FILE scale=1]

ARM: none, pred (the student's maps), true (the labels as maps). pre: the decoder reads captions alone before.
scale=1: LN_pre and LN_post start at the student's own scale. "blind": captions beside another image.
"""
import sys
import data
import json, time, math, copy
import torch, torch.nn.functional as F, numpy as np
import prism, train
torch.set_num_threads(1)
ck="out/prism.pt"
MAPS=train.Args.caption_experts
def store(split, model):
    f=f"out/{split}-maps.pt"
    try: return torch.load(f)
    except FileNotFoundError: pass
    world=data.open_data("world",split)
    ims,preds,trues=[],[],[]
    with torch.inference_mode():
        for a in range(0,len(world),64):
            rows=[world.read(i,True) for i in range(a,min(a+64,len(world)))]
            im=torch.stack([data.squeeze(r["image"],(64,64)) for r in rows]).float()
            if im.max()>1.5: im=im/255
            ims.append(im.half()); preds.append({k:v.half() for k,v in model.predict(im,MAPS).items()})
            t={}
            for task in MAPS:
                y=torch.stack([torch.as_tensor(np.array(r[task])) for r in rows]).float(); kind=data.TASKS[task].kind
                if kind=="normals" and y.shape[-1]==3: y=y.movedim(3,1)
                if kind!="normals" and y.ndim==4: y=y[...,0]
                known=torch.where((y==data.IGNORE)|y.isnan(),0,y)
                t[task]=(20.0*F.one_hot(known.long(),world.tasks[task]).movedim(3,1) if kind in("classes","mask") else 20*known[:,None]-10 if kind=="edge" else known if kind=="normals" else known[:,None]).half()
            trues.append(t)
    cat=lambda l:{k:torch.cat([p[k] for p in l]) for k in MAPS}
    o={"image":torch.cat(ims),"pred":cat(preds),"true":cat(trues)}
    torch.save(o,f); return o
def main(arm,steps,B,lr,seed,**kw):
    student=prism.load(ck)
    tr,va=store("train",student),store("val",student)
    args=train.Args(stage="caption",prismer_z=arm=="none",seed=seed); 
    torch.manual_seed(seed)
    world=data.open_data("world","train"); pairs=data.Captioned(world,(64,64))
    for k,v in kw.items():
        if k in train.TOY: train.TOY[k]=type(train.TOY[k])(v)
    model,_=train.build_prismer(args,ck,pairs)
    pairs.encode=model.encode
    if "scale" in kw:
        with torch.no_grad():
            x=student.embed(tr["image"][:256].float())[:,1:]
            if kw["scale"]=="1": model.norm_pre.weight.fill_(x.std(-1).mean())
            model.norm_post.load_state_dict(student.norm.state_dict())
    vpairs=data.Captioned(data.open_data("world","val"),(64,64),model.encode)
    toks=[model.encode(c[0]) for c in pairs.captions]; vt=[model.encode(c[0]) for c in vpairs.captions]
    stage=train.STAGES["caption"]["world"]._replace(steps=steps,batch_size=B,lr=lr)
    model.train()
    pre=int(kw.get("pre",0)); PB=int(kw.get("pb",16)); plr=float(kw.get("plr",3e-3)); c0=time.process_time()
    if pre:
        text=model.text; ps=[p for n,p in text.named_parameters()]
        popt=torch.optim.AdamW(ps,lr=plr,weight_decay=0.05); pstage=stage._replace(steps=pre,lr=plr)
        for step,batch in enumerate(data.sample_order(len(toks),PB,range(pre),seed+1,0,1)):
            t=torch.nn.utils.rnn.pad_sequence([toks[i] for i,_,_ in batch],True,data.PAD)
            for g in popt.param_groups: g["lr"]=train.lr_at(step,pstage)
            terms,told=train.caption_terms(text(t,torch.zeros(len(t),1,96)),t,1)
            terms["caption"][1].backward(); popt.step(); popt.zero_grad()
            if (step+1)%(pre//4)==0: print("pre",step+1,round(told["nll"].item(),3),round(time.process_time()-c0,1),flush=True)
    if "load" in kw: model.text.load_state_dict(torch.load(kw["load"]))
    if "save" in kw: torch.save(model.text.state_dict(),kw["save"])
    if steps==0: return
    opt=train.build_optimizer(model,stage,True)
    cur={}
    which="true" if arm=="true" else "pred"
    def predict(images,tasks):
        st,rows=cur["x"]
        return {t:st[which][t][rows].float() for t in tasks}
    model.student.predict=predict
    pad=lambda ts:torch.nn.utils.rnn.pad_sequence(ts,True,data.PAD)
    def val(roll=0):
        model.eval(); tot=n=0
        with torch.inference_mode():
            for a in range(0,256,32):
                rows=list(range(a,a+32)); t=pad([vt[i] for i in rows]); rows=[(i+roll)%256 for i in rows]; cur["x"]=(va,rows)
                k=(t[:,1:]!=data.PAD).sum().item(); tot+=k*train.caption_terms(model(va["image"][rows].float(),t),t,1)[1]["nll"].item(); n+=k
        model.train(); return tot/n
    c0=time.process_time()
    for step,batch in enumerate(data.sample_order(len(toks),B,range(steps),seed,0,1)):
        rows=[i for i,_,_ in batch]
        cur["x"]=(tr,rows); t=pad([toks[i] for i in rows])
        for g in opt.param_groups: g["lr"]=g["factor"]*train.lr_at(step,stage)
        terms,told=train.caption_terms(model(tr["image"][rows].float(),t),t,1)
        terms["caption"][1].backward(); opt.step(); opt.zero_grad()
        if (step+1)%max(1,(steps//4))==0: print(json.dumps(dict(blind=round(val(7),4) if step+1>steps-4 else None,arm=arm,steps=steps,B=B,lr=lr,seed=seed,**kw,step=step+1,train=round(told["nll"].item(),3),val=round(val(),4),cpu=round(time.process_time()-c0,1))),flush=True)
if __name__=="__main__":
    a=sys.argv; kw=dict(x.split("=") for x in a[6:])
    main(a[1],int(a[2]),int(a[3]),float(a[4]),int(a[5]),**kw)

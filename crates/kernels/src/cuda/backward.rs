//! The gradients of a layer of experts: of its inputs, its gates, and the parameters that train.

use super::adapters::{combine, expand_pre, sum_pairs};
use super::block::{Adapted, Block, Shape};
use super::device::{Element, Gpu};
use super::gradients::{Gradients, Trained};
use super::grouped::{Grouped, Kind, Path, Segments};
use super::products::{Out, Rows, Transposed, outer};
use super::rows::{Activations, sum_pairs_two, swiglu_backward};
use super::workspace::Workspace;
use super::{Result, ensure};
use cudarc::driver::DevicePtr;

/// What a backward pass is about.
struct Pass<'a, T, X> {
    gpu: &'a Gpu,
    block: &'a Block<T>,
    x: &'a X,
    dout: &'a X,
    tokens: usize,
    trained: Trained,
    /// Rows of dense positions, of adapted ones, and pairs.
    dense: Segments,
    slots: Segments,
    pairs: Segments,
}

impl<T: Element> Block<T> {
    /// The gradients for `dout: [T, H]`, that of the layer's output for `x: [T, H]`. `work` holds the
    /// tables of the forward pass of the same `x`; what else is needed is computed again. The gradient of
    /// the router follows from that of the gates.
    ///
    /// # Errors
    /// If sizes do not fit.
    #[allow(clippy::too_many_arguments)]
    pub fn backward<X: DevicePtr<T>>(
        &self,
        gpu: &Gpu,
        x: &X,
        dout: &X,
        tokens: usize,
        trained: Trained,
        work: &mut Workspace<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<()> {
        self.check(x, tokens, work, dout)?;
        self.check_routed(tokens, work)?;
        ensure!(
            self.frame.ranks.is_none(),
            "adapters of ranks of their own have no backward pass here"
        );
        ensure!(
            gradients.shape == self.frame.shape && gradients.tokens == tokens,
            "gradients of {} tokens of {:?} for {tokens} of {:?}",
            gradients.tokens,
            gradients.shape,
            self.frame.shape
        );
        let Shape {
            hidden: h,
            inner: f,
            rank: r,
            dense,
            adapted,
            groups,
            top_k,
            ..
        } = self.frame.shape;
        ensure!(
            gradients.x.len() == tokens * h && gradients.gates.len() == tokens * top_k,
            "the gradients of inputs and gates have {} and {} entries; [{tokens}, {h}] and [{tokens}, \
             {top_k}] were expected",
            gradients.x.len(),
            gradients.gates.len()
        );
        if trained.dense {
            gradients
                .dense
                .check::<f32>("dense experts' gradients", dense, f * h, h * f)?;
        }
        if trained.bases {
            gradients
                .bases
                .check::<f32>("bases' gradients", groups, f * h, h * f)?;
        }
        if trained.adapters {
            let Adapted { a, b } = &gradients.adapters;
            a.check::<f32>("gradients of the adapters' a", adapted, r * h, r * f)?;
            b.check::<f32>("gradients of the adapters' b", adapted, f * r, h * r)?;
        }
        let rows = self.frame.shape.rows(tokens);
        let pass = Pass {
            gpu,
            block: self,
            x,
            dout,
            tokens,
            trained,
            dense: work.tables.rows(gpu, 0, rows),
            slots: work.tables.rows(gpu, self.frame.shape.dense, rows),
            pairs: work.tables.pairs(gpu, self.frame.shape.pairs(tokens)),
        };
        pass.activations(work, gradients)?;
        pass.inputs(work, gradients)?;
        pass.parameters(work, gradients)
    }
}

impl<T: Element, X: DevicePtr<T>> Pass<'_, T, X> {
    /// A product of the forward pass, computed again; as many rows fall to every group.
    fn forward(&self, path: Path, groups: usize, sizes: [usize; 2]) -> Grouped {
        Grouped::new(path, groups, sizes, self.dense.rows)
    }

    /// The pre-activations again, and the gradients of what lies between the projections: `gradients.gate`
    /// and `up`, `gradients.gates`, and `work.h`.
    fn activations(&self, work: &mut Workspace<T>, to: &mut Gradients<T>) -> Result<()> {
        let (gpu, w) = (self.gpu, &self.block.weights);
        let Shape {
            hidden,
            inner,
            dense,
            adapted,
            groups,
            rank,
            ..
        } = self.block.frame.shape;
        let of_token = |rows: &Segments| Rows::of_tokens(gpu, self.dout, hidden, rows);
        if dense > 0 {
            self.forward(work.path, dense, [inner, hidden]).run(
                gpu,
                Kind::Dual(&w.dense.gate, &w.dense.up, &mut to.gate, &mut to.up),
                self.x,
                &self.dense.gathered(),
            )?;
            let dh = Out::rows(gpu, &mut work.h, inner);
            Transposed::new(work.path, dense, [inner, hidden]).one(
                gpu,
                (of_token(&self.dense), &w.dense.down),
                dh,
                &self.dense,
            )?;
        }
        if groups > 0 {
            self.block.bases_on_pairs(gpu, self.x, self.tokens, work)?;
            let dh = Out::rows(gpu, &mut to.pair_dh, inner);
            Transposed::new(work.path, groups, [inner, hidden]).one(
                gpu,
                (of_token(&self.pairs), &w.bases.down),
                dh,
                &self.pairs,
            )?;
        }
        if adapted > 0 {
            let Adapted { a, b } = &w.adapters;
            self.block.parts_of_slots(gpu, self.x, self.tokens, work)?;
            expand_pre(gpu, self.block, work, &mut to.gate, &mut to.up)?;
            for (w, first, count) in self.block.own() {
                let Some(own) = &mut work.own else { continue };
                let rows = &work.tables.rows(gpu, dense + first, self.slots.rows);
                let dh = Out::rows(gpu, &mut own.gate, inner);
                Transposed::new(work.path, count, [inner, hidden]).one(
                    gpu,
                    (of_token(rows), &w.down),
                    dh,
                    rows,
                )?;
            }
            let low = Out::rows(gpu, &mut to.low_down, rank);
            Transposed::new(work.path, adapted, [rank, hidden]).one(
                gpu,
                (of_token(&self.slots), &b.down),
                low,
                &self.slots,
            )?;
            let dh = Out::rows(gpu, &mut work.h, inner);
            Transposed::new(work.path, adapted, [inner, rank]).one(
                gpu,
                (Rows::sorted(gpu, &to.low_down, rank), &a.down),
                dh,
                &self.slots,
            )?;
        }
        let own = work.own.take();
        let of = Activations {
            gate: &mut to.gate,
            up: &mut to.up,
            gates: &mut to.gates,
            pair_dh: (groups > 0).then_some(&to.pair_dh),
            own_dh: own
                .as_ref()
                .filter(|_| self.block.has_own())
                .map(|own| &own.gate),
        };
        let done = swiglu_backward(gpu, self.block, self.tokens, work, of);
        work.own = own;
        done?;
        if groups > 0 {
            let sums = (&mut to.pair_gate, &mut to.pair_up);
            sum_pairs_two(gpu, self.block, self.tokens, work, (&to.gate, &to.up), sums)?;
        }
        Ok(())
    }

    /// `gradients.x` and `gradients.low`.
    fn inputs(&self, work: &mut Workspace<T>, to: &mut Gradients<T>) -> Result<()> {
        let (gpu, w) = (self.gpu, &self.block.weights);
        let Shape {
            hidden,
            inner,
            dense,
            adapted,
            groups,
            rank,
            ..
        } = self.block.frame.shape;
        let (gate, up) = (
            Rows::sorted(gpu, &to.gate, inner),
            Rows::sorted(gpu, &to.up, inner),
        );
        if dense > 0 {
            let y = Out::rows(gpu, &mut work.y, hidden);
            Transposed::new(work.path, dense, [hidden, inner]).two(
                gpu,
                (gate, &w.dense.gate),
                (up, &w.dense.up),
                y,
                &self.dense,
            )?;
        }
        if adapted > 0 {
            let Adapted { a, b } = &w.adapters;
            let low = Out::rows(gpu, &mut to.low, 2 * rank);
            let shrink = Transposed::new(work.path, adapted, [rank, inner]);
            shrink.one(gpu, (gate, &b.gate), low, &self.slots)?;
            shrink.one(gpu, (up, &b.up), low.right::<T>(), &self.slots)?;
            let low = Rows::sorted(gpu, &to.low, 2 * rank);
            for (w, first, count) in self.block.own() {
                let Some(own) = &mut work.own else { continue };
                let rows = &work.tables.rows(gpu, dense + first, self.slots.rows);
                let y = Out::rows(gpu, &mut own.y, hidden);
                Transposed::new(work.path, count, [hidden, inner]).two(
                    gpu,
                    (gate, &w.gate),
                    (up, &w.up),
                    y,
                    rows,
                )?;
            }
            let y = Out::rows(gpu, &mut work.y, hidden);
            Transposed::new(work.path, adapted, [hidden, rank]).two(
                gpu,
                (low, &a.gate),
                (low.right::<T>(), &a.up),
                y,
                &self.slots,
            )?;
        }
        if groups > 0 {
            let y = Out::rows(gpu, &mut work.pair_y, hidden);
            Transposed::new(work.path, groups, [hidden, inner]).two(
                gpu,
                (Rows::sorted(gpu, &to.pair_gate, inner), &w.bases.gate),
                (Rows::sorted(gpu, &to.pair_up, inner), &w.bases.up),
                y,
                &self.pairs,
            )?;
        }
        combine(gpu, self.block, self.tokens, work, &mut to.x)
    }

    /// The gradients of the parameters that train.
    fn parameters(&self, work: &mut Workspace<T>, to: &mut Gradients<T>) -> Result<()> {
        let (gpu, path, w) = (self.gpu, work.path, &self.block.weights);
        let Shape {
            hidden,
            inner,
            dense,
            adapted,
            groups,
            rank,
            ..
        } = self.block.frame.shape;
        let (gate, up, h) = (
            Rows::sorted(gpu, &to.gate, inner),
            Rows::sorted(gpu, &to.up, inner),
            Rows::sorted(gpu, &work.h, inner),
        );
        let x = |rows: &Segments| Rows::of_tokens(gpu, self.x, hidden, rows);
        let dout = |rows: &Segments| Rows::of_tokens(gpu, self.dout, hidden, rows);
        if dense > 0 && self.trained.dense {
            let (rows, down) = (&self.dense, &self.dense.scaled());
            outer::<T>(
                gpu,
                path,
                [dense, inner, hidden],
                gate,
                x(rows),
                &mut to.dense.gate,
                rows,
            )?;
            outer::<T>(
                gpu,
                path,
                [dense, inner, hidden],
                up,
                x(rows),
                &mut to.dense.up,
                rows,
            )?;
            outer::<T>(
                gpu,
                path,
                [dense, hidden, inner],
                dout(rows),
                h,
                &mut to.dense.down,
                down,
            )?;
        }
        if groups > 0 && self.trained.bases {
            sum_pairs(gpu, self.block, self.tokens, work)?;
            let rows = &self.pairs;
            let pair = |t| Rows::sorted::<T>(gpu, t, inner);
            let bases = &mut to.bases;
            let up = [groups, inner, hidden];
            outer::<T>(
                gpu,
                path,
                up,
                pair(&to.pair_gate),
                x(rows),
                &mut bases.gate,
                rows,
            )?;
            outer::<T>(
                gpu,
                path,
                up,
                pair(&to.pair_up),
                x(rows),
                &mut bases.up,
                rows,
            )?;
            let down = [groups, hidden, inner];
            outer::<T>(
                gpu,
                path,
                down,
                dout(rows),
                pair(&work.pair_h),
                &mut bases.down,
                rows,
            )?;
        }
        if adapted > 0 && self.trained.adapters {
            self.forward(work.path, adapted, [rank, inner]).run(
                gpu,
                Kind::Plain(&w.adapters.a.down, &mut work.low_down),
                &work.h,
                &self.slots.scaled(),
            )?;
            let rows = &self.slots;
            let Adapted { a, b } = &mut to.adapters;
            let low = Rows::sorted(gpu, &work.low, 2 * rank);
            let (n, right) = (adapted, low.right::<T>());
            outer::<T>(gpu, path, [n, inner, rank], gate, low, &mut b.gate, rows)?;
            outer::<T>(gpu, path, [n, inner, rank], up, right, &mut b.up, rows)?;
            let low = Rows::sorted(gpu, &work.low_down, rank);
            outer::<T>(
                gpu,
                path,
                [n, hidden, rank],
                dout(rows),
                low,
                &mut b.down,
                rows,
            )?;
            let low = Rows::sorted(gpu, &to.low, 2 * rank);
            outer::<T>(
                gpu,
                path,
                [n, rank, hidden],
                low,
                x(rows),
                &mut a.gate,
                rows,
            )?;
            outer::<T>(
                gpu,
                path,
                [n, rank, hidden],
                low.right::<T>(),
                x(rows),
                &mut a.up,
                rows,
            )?;
            let low = Rows::sorted(gpu, &to.low_down, rank);
            outer::<T>(
                gpu,
                path,
                [n, rank, inner],
                low,
                h,
                &mut a.down,
                &rows.scaled(),
            )?;
        }
        Ok(())
    }
}

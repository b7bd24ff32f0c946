package smartvm_test

import (
	"go/types"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/go/packages"
)

// An embedder can name each type that a public package shows, and read of it: none is of an
// internal package.
func TestHouse_PublicTypes(t *testing.T) {
	all, err := packages.Load(
		&packages.Config{
			Mode:    packages.NeedName | packages.NeedTypes | packages.NeedImports | packages.NeedDeps,
			Context: t.Context(),
		}, "./...")
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, p := range all {
		if len(p.Errors) > 0 {
			t.Fatal(p.Errors)
		}
		if isInternal(p.PkgPath) || p.Name == "main" {
			continue
		}
		checked++
		scope := p.Types.Scope()
		for _, name := range scope.Names() {
			if o := scope.Lookup(name); o.Exported() {
				for _, hidden := range shown(o) {
					t.Errorf("%s.%s shows %s", p.PkgPath, name, hidden)
				}
			}
		}
	}
	if checked < 10 {
		t.Errorf("%d public packages were found", checked)
	}
}

func isInternal(path string) bool { return slices.Contains(strings.Split(path, "/"), "internal") }

// shown are the types of internal packages that an exported object shows.
func shown(o types.Object) (hidden []string) {
	seen := map[types.Type]bool{}
	var walk func(t types.Type)
	fields := func(s *types.Struct) {
		for f := range s.Fields() {
			if f.Exported() {
				walk(f.Type())
			}
		}
	}
	walk = func(t types.Type) {
		if seen[t] {
			return
		}
		seen[t] = true
		switch t := t.(type) {
		case *types.Alias:
			walk(types.Unalias(t))
		case *types.Named:
			if p := t.Obj().Pkg(); p != nil && isInternal(p.Path()) && strings.HasPrefix(p.Path(), module) {
				hidden = append(hidden, t.String())
			}
			for a := range t.TypeArgs().Types() {
				walk(a)
			}
		case interface{ Elem() types.Type }: // pointers, slices, arrays, channels, maps
			walk(t.Elem())
			if m, ok := t.(*types.Map); ok {
				walk(m.Key())
			}
		case *types.Signature:
			walk(t.Params())
			walk(t.Results())
		case *types.Tuple:
			for v := range t.Variables() {
				walk(v.Type())
			}
		case *types.Struct:
			fields(t)
		case *types.Interface:
			for m := range t.ExplicitMethods() {
				walk(m.Type())
			}
		}
	}
	if name, ok := o.(*types.TypeName); ok {
		if name.IsAlias() {
			walk(o.Type())
			return hidden
		}
		named := o.Type().(*types.Named)
		walk(named.Underlying())
		for m := range named.Methods() {
			if m.Exported() {
				walk(m.Type())
			}
		}
		return hidden
	}
	walk(o.Type())
	return hidden
}
